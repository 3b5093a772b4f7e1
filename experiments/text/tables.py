"""One table, written for a terminal, for Markdown and for HTML from the same cells; no JAX."""

from typing import NamedTuple

from markupsafe import Markup

from experiments.text import formats


class Table(NamedTuple):
    """Cells of text: a head of the columns' names (none: rows are names and values), rows, and perhaps rows at the foot."""

    head: list
    rows: list
    foot: tuple = ()

    def text(self):
        """The table in aligned columns: the first to the left, all others to the right.

        >>> print(Table(["client", "records"], [["0", "1,640"], ["1", "600"]]).text())
        client  records
        0         1,640
        1           600
        """
        lines = [line for line in (self.head, *self.rows, *self.foot) if line]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
        return "\n".join("  ".join(cells).rstrip() for cells in aligned)

    def markdown(self):
        """The table in Markdown, its cells escaped; a list of names and values where there is no head.

        >>> print(Table(["case", "accuracy"], [["FedAvg", "0.78"]]).markdown())
        | case | accuracy |
        | --- | --- |
        | FedAvg | 0.78 |
        """
        rows = [[formats.markdown(cell) for cell in line] for line in (*self.rows, *self.foot)]
        if not self.head:
            return Markup("\n".join(f"- {name}: {value}" for name, value in rows))
        head = [formats.markdown(cell) for cell in self.head]
        return Markup("\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)))

    def html(self):
        """The table in HTML, its cells escaped, in a box of its own that scrolls."""
        head = Markup("").join(Markup('<th scope="col">{}</th>').format(cell) for cell in self.head)
        parts = Markup("<thead><tr>{}</tr></thead>").format(head) if self.head else Markup("")
        parts += Markup("<tbody>{}</tbody>").format(_rows(self.rows))
        parts += Markup("<tfoot>{}</tfoot>").format(_rows(self.foot)) if self.foot else Markup("")
        kind = Markup("" if self.head else ' class="words"')
        return Markup('<div class="box" tabindex="0"><table{}>{}</table></div>').format(kind, parts)


def _rows(rows):
    cell = Markup("<td>{}</td>")
    row = Markup('<tr><th scope="row">{}</th>{}</tr>')
    return Markup("").join(row.format(line[0], Markup("").join(map(cell.format, line[1:]))) for line in rows)
