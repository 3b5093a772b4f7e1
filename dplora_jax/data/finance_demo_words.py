"""The words of `finance_demo`: what moves and how, and the entities and templates of its two splits; all made up.

Slots of a template. {own} and {at}: a subject ("Cedar Bank's", "at Cedar Bank", "in Oakport"); {C}: a company;
{M}: a metric, {O}: one of the opposite kind; a direction of movement as past {V}, base {v}, noun {N}; its opposite as
{W}, {w}, {X}; {U} and {L}: up and down in random order (neutral templates); {A} and {B}: the amounts now and before,
{cash}: some money, {n}: a small number; {side}: "above" or "below"; {R}, {S}: raised or lowered, and its opposite;
{new} and {old}: profit or loss; {hit}, {hid}: beat or missed, and its opposite; {P}: percent; {T}: period;
{D}: weekday; {F}: place; {E}: person.
"""

from typing import NamedTuple


class Metric(NamedTuple):
    """What moves: `unit` is m (money), p (percent) or n (a count); `good` says whether more of it is good news."""

    name: str
    unit: str
    good: bool
    gap: bool  # may widen or narrow


class Verb(NamedTuple):
    past: str
    base: str
    noun: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _metrics(good: str, bad: str) -> tuple[Metric, ...]:
    """Metrics from "name:unit" lists; a trailing ~ marks one that may widen or narrow."""
    made = []
    for is_good, listing in ((True, good), (False, bad)):
        for entry in _words(listing):
            name, unit = entry.rstrip("~").split(":")
            made.append(Metric(name, unit, is_good, entry.endswith("~")))
    return tuple(made)


def _verbs(text: str) -> tuple[Verb, ...]:
    return tuple(Verb(*entry.split("/")) for entry in _words(text))


METRICS = {
    "firm": _metrics(
        "profit:m, operating profit:m, revenue:m, sales:m, margins:p~, orders:n, cash flow:m, market share:p",
        "costs:m, debt:m, losses:m~, customer complaints:n, staff turnover:p, late deliveries:n, penalties:m,"
        "unpaid bills:m",
    ),
    "bank": _metrics(
        "net profit:m, interest income:m, new accounts:n, customer deposits:m",
        "bad loans:m, late loans:n, fraud losses:m, funding costs:m",
    ),
    "place": _metrics("hiring:n, exports:m, tourism:m, house building:n", "unemployment:p, bankruptcies:n, poverty:p"),
}
UNSEEN_METRICS = {
    "firm": _metrics("earnings:m, bookings:n", "overheads:m, accidents:n"),
    "bank": _metrics("fee income:m", "impairments:m"),
    "place": _metrics("investment:m", "job losses:n"),
}
VERBS = {
    1: _verbs("rose/rise/rise, grew/grow/rise, increased/increase/rise, climbed/climb/climb, jumped/jump/jump"),
    -1: _verbs("fell/fall/fall, dropped/drop/drop, declined/decline/decline, shrank/shrink/reduction, sank/sink/drop"),
}
UNSEEN_VERBS = {1: _verbs("surged/surge/surge"), -1: _verbs("slid/slide/slide")}
GAP_VERBS = {1: Verb("widened", "widen", "widening"), -1: Verb("narrowed", "narrow", "narrowing")}
MOVES = {1: _words("raised, lifted, increased"), -1: _words("lowered, cut, reduced")}

PERIODS = _words(
    "the first quarter, the second quarter, the third quarter, the fourth quarter, the first half, the second half,"
    "March, June, the spring, the autumn, 2019, 2021, 2023"
)
DAYS = _words("Monday, Tuesday, Wednesday, Thursday, Friday")
CURRENCIES = _words("euros, dollars, pounds")
PERCENTS = _words(
    "2, 3, 4, 5, 6, 7, 9, 12, 14, 15, 17, 20, 25, 30, 1.5, 2.4, 3.2, 4.6, 5.1, 6.3, 7.9"
)  # no "an": 8, 11, 18


class Split(NamedTuple):
    """The entities and templates of one split."""

    firms: tuple[str, ...]
    banks: tuple[str, ...]
    places: tuple[str, ...]
    persons: tuple[str, ...]
    events: tuple[tuple[str, ...], ...]  # by label; told within a frame
    frames: tuple[str, ...]
    signed: tuple[str, ...]  # the same for positive and negative records
    neutral: tuple[str, ...]
    unseen: bool  # adds the metrics and verbs that training lacks


TRAIN = Split(
    firms=_words(
        "Harbor Foods, Falcon Steel, Maple Energy, Silver Mining, Atlas Motors, Delta Paper, Eagle Airlines,"
        "Coral Shipping, Amber Textiles, Phoenix Software, Granite Cement, Meadow Farms, Polar Telecom, Summit Hotels,"
        "Crown Toys, Orchid Drugs"
    ),
    banks=_words("Cedar Bank, Northern Savings, Monarch Insurance, Pioneer Credit, Valley Mutual, Liberty Lending"),
    places=_words("Oakport, Eastmoor, Redford, Stonebridge, Milltown, Kingsbury"),
    persons=_words(
        "Anna Berg, Paul Novak, Maria Costa, Peter Lang, Julia Stone, Martin Reed, Laura Quinn, Simon Walsh"
    ),
    events=(
        _words(
            "was fined for fraud, closed its oldest plant, dismissed hundreds of workers, lost its largest client,"
            "recalled a faulty product, filed for bankruptcy, was sued by angry investors, missed a payment to lenders,"
            "stopped its dividend, warned of a weak year, was hit by a long strike, saw its shares crash,"
            "faces a criminal inquiry, had its licence withdrawn, fell behind all its rivals, was robbed by hackers,"
            "gave up its biggest project, had its worst year ever, is deep in crisis, upset its customers again"
        ),
        _words(
            "moved its office to {F}, changed its logo, will hold its annual meeting in {F},"
            "named {E} as head of research, uses new accounting software, publishes its figures on {D},"
            "has {n} offices in {F}, was founded in {F},"
            "rents {n} floors of an office block, hosts a seminar in {F}, updated its website, sells to {n} countries,"
            "opens its doors at {n} every day, has {n} people on its board, will repeat its survey on {D},"
            "replaced {E} as planned, translated its annual report, belongs to a trade group in {F}"
        ),
        _words(
            "won a prize for its service, was praised by its customers, opened a busy new plant,"
            "hired hundreds of workers, sold out its newest product, had its best year ever, got a top credit score,"
            "paid a bonus to all its staff, gained the trust of investors, found a rich new market,"
            "won back old clients, doubled its dividend,"
            "secured a huge contract, moved ahead of all its rivals, recovered from its crisis,"
            "was named best employer, finished its biggest project early, paid off all its loans,"
            "is in very good health, saw its shares soar"
        ),
    ),
    frames=(
        "{C} {event}.",
        "Earlier this week, it became known that {C} {event}.",
        "{C} {event}, the company said on {D}.",
        "According to {E}, {C} {event}.",
        "News from {F}: {C} {event}.",
        "The paper says that {C} {event}.",
    ),
    signed=(
        "{own} {M} {V} {P}% in {T}.",
        "{own} {M} {V} again in {T}.",
        "In {T}, {own} {M} {V} by {P}%.",
        "{M} {at} {V} {P}% in {T}.",
        "A {P}% {N} in {M} was reported {at}.",
        "The report on {D} will show a {N} in {M} {at}.",
        "{own} {M} {V} while {O} {W} in {T}.",
        "{M} {V} and {O} {W} {at}.",
        "{own} {M} had been expected to {w}, but {V}.",
        "Analysts had forecast a {X} in {M} {at} and got a {N}.",
        "{M} {at} came to {A}, after {B} a year earlier.",
        "{own} {M} went from {B} to {A}.",
        "{own} {M} came in {side} forecasts in {T}.",
        "{M} {at} for {T} turned out {side} plan.",
        "{C} {R} its forecast for {M} by {P}%.",
        "{C} {R} its forecast for {M} and {S} that for {O}.",
        "{C} swung from a {old} to a {new} in {T}.",
        "{C}, which {hid} forecasts in {T}, {hit} them this time.",
        "{C} said on {D} that {M} {V} {P}%.",
        "{E}, who will chair {C}, said {M} {V} in {T}.",
        "With prices unchanged, {own} {M} {V} {P}%.",
        "After a {X} in {T}, {M} {at} {V} on balance for the year.",
        "{M} {at} did not {w} in {T}: instead, {M} {V}.",
    ),
    neutral=(
        "{C} will report on {D} whether {M} {U} or {L} in {T}.",
        "{own} {M} neither {U} nor {L} in {T}.",
        "{own} {M} stayed at {A}, the same as a year earlier.",
        "{M} {at} held at {A} in {T}, unchanged.",
        "{M} {at} {U} {P}% and {L} back to the same level.",
        "{C} named {E} to lead the team that tracks {M} in {F}.",
        "The report on {D} lists {M} and {O} {at} by region.",
        "{C} has not yet said if {M} {U} in {T}.",
        "{C} will publish its figures for {T} on {D}.",
        "{E} of {C} will speak in {F} on {D}.",
        "{C} repeated its forecast for {M} of {A}.",
        "{C} kept its forecast for {M}, despite talk that it had {R} it.",
        "Analysts differ on whether {own} {M} {U} or {L}.",
        "{C} signed a lease for {n} years on an office in {F}.",
        "{C} changed how it measures a {N} in {M}.",
        "{own} {M} came in exactly on plan at {A}.",
        "{C} holds {P}% of a supplier in {F}, as before.",
        "A book by {E} explains what can make {M} {v} or {w}.",
        "{C} will explain on {D} how it counts {M} and {O}.",
        "It is too early to say whether {M} {at} will {v} or {w}.",
    ),
    unseen=False,
)
TEST = Split(
    firms=_words(
        "Nordwind Power, Tiger Chemicals, Willow Clothing, Comet Electronics, Bishop Brothers, Jasper Glass,"
        "Raven Media, Prairie Dairy, Velvet Cosmetics, Anchor Ferries"
    ),
    banks=_words("Lotus Finance, Heritage Assurance, Bridge Capital, Olive Pensions"),
    places=_words("Westhaven, Greenfield, Longwood, Ashland"),
    persons=_words("Clara Weiss, David Moreno, Helen Park, Oscar Lind, Ruth Carter"),
    events=(
        _words(
            "collapsed into insolvency, suffered a disastrous season, is accused of bribery, was downgraded to junk,"
            "disappointed shareholders with dismal results, suspended payouts amid trouble, admitted false entries,"
            "is running out of money, was raided by police, broke promises to creditors, must destroy unsafe goods,"
            "shut shops amid poor demand, failed a safety inspection, made half the workforce redundant"
        ),
        _words(
            "relocated an archive to {F}, picked blue for brochures, convenes members in {F}, appointed {E} secretary,"
            "retains an external auditor, stores documents in {F}, maintains {n} warehouses, registered a trade name,"
            "invited students to {F}, answered a questionnaire on {D}, operates {n} branches, ordered stationery,"
            "renamed a department, exhibits in {F} each winter"
        ),
        _words(
            "celebrated a record season, signed a lucrative deal, attracted thousands of subscribers,"
            "emerged from insolvency, received an award for quality,"
            "delighted shareholders with excellent results, earned an upgrade to prime,"
            "landed a giant order, enjoys booming demand, overtook competitors, is thriving, made creditors happy,"
            "completed a successful launch, created hundreds more jobs"
        ),
    ),
    frames=(
        "It was confirmed: {C} {event}.",
        "Reports out of {F} state that {C} {event}.",
        "{C} {event}, writes {E}.",
        "Readers learn today that {C} {event}.",
        "{C} of {F} {event}.",
    ),
    signed=(
        "For {T}, {own} figures show that {M} {V} {P}%.",
        "New: {M} {at} {V} to {A} from {B}.",
        "{at}, {M} {V}, the biggest {N} since {T}.",
        "This year brought {C} {M} of {A}, last year {B}.",
        "Investors in {C} learn of a {P}% {N} in {M}.",
        "The {N} in {own} {M} went on through {T}.",
        "While {O} {W}, {own} {M} {V}.",
        "Talk of a {X} in {M} {at} was wrong; it was a {N}.",
        "{E} told staff in {F} that {own} {M} {V} sharply.",
        "Meeting in {F}, the board of {C} noted that {M} {V} {P}%.",
        "Compared with forecasts, {M} {at} ended {T} well {side}.",
        "{C} now sees {M} {P}% {side} its earlier outlook.",
        "In place of last year's {old}, {C} made a {new} of {cash}.",
        "{C} {hit} estimates in {T} but {hid} them before.",
        "Quarterly update from {C}: {M} {V}, {O} {W}.",
        "The guidance of {C} for {M} was {R}, not {S}.",
    ),
    neutral=(
        "Did {M} {at} {v} or {w} in {T}? Figures are due soon.",
        "The figures of {C} show {M} of {A}, exactly as last year.",
        "Investors in {C} wait to hear if {M} {U} or {L}.",
        "{M} {at} {U} early on, then {L} by as much, ending level.",
        "{E} joins the board of {C} in {F}.",
        "The guidance of {C} for {M} remains {A}.",
        "Meeting in {F}, the board of {C} discussed {M} and {O}.",
        "Quarterly update from {C}: {M} level, {O} level.",
        "A glossary from {C} defines a {N} in {M}.",
        "{C} moved the update for {T} to {D}.",
        "Compared with forecasts, {M} {at} ended {T} just in line.",
        "{E} told students in {F} how {M} can {v} or {w}.",
        "The yearly fair of {C} in {F} lasts {n} days.",
        "{C} neither {R} nor {S} its outlook for {M}.",
        "An audit of {C} covers {M} and {O} for {T}.",
    ),
    unseen=True,
)
