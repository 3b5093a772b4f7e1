"""Public classification tables that are known by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A public classification table: where the hub has it, its columns, and the names of its labels 0, 1, ..."""

    hub_id: str
    hub_revision: str
    hub_folder: str | None
    text_column: str
    label_column: str
    label_names: tuple[str, ...]


BENCHMARKS = {
    "financial_phrasebank": Benchmark(
        # The repository holds a script, which `datasets` refuses; this branch of it holds the hub's own conversion.
        "takala/financial_phrasebank",
        "refs/convert/parquet",
        "sentences_50agree",
        "sentence",
        "label",
        ("negative", "neutral", "positive"),
    ),
    "twitter_financial_news_sentiment": Benchmark(
        "zeroshot/twitter-financial-news-sentiment",
        "main",
        None,
        "text",
        "label",
        ("bearish", "bullish", "neutral"),
    ),
}
