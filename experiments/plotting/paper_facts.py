"""Figures that the paper reports: Xiao, Tian, Chen, Han, Lewis, "Efficient Streaming Language Models with Attention
Sinks", ICLR 2024 (arXiv 2309.17453), by table and figure.
"""

from dataclasses import dataclass

CITATION = (
    "Xiao, Tian, Chen, Han and Lewis: Efficient Streaming Language Models with Attention Sinks. ICLR 2024, "
    "arXiv 2309.17453"
)


@dataclass(frozen=True)
class Reported:
    """What the paper reports for an experiment: in words, and as a table (`head` and `rows`), if it has one."""

    where: str
    text: str
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


REPORTED = {
    "methods": Reported(
        "Fig. 3",
        "On 20,000 tokens (Llama-2, MPT, Falcon, Pythia): dense attention fails beyond the length of pre-training, "
        "window attention once the first tokens leave the cache; StreamingLLM stays beside re-computation.",
    ),
    "line-breaks": Reported(
        "Table 1",
        "Llama-2-13B, the first book of the PG19 test set (65,000 tokens), perplexity.",
        ("cache", "perplexity"),
        (("0 + 1024 (window)", "5158.07"), ("4 + 1020", "5.40"), ('4 "\\n" + 1020', "5.60")),
    ),
    "sinks": Reported(
        "Table 2",
        "PG19 test set, 400,000 tokens, perplexity; the cache holds 2,048 tokens (Llama-2-7B: 4,096).",
        ("sinks", "Falcon-7B", "MPT-7B", "Pythia-12B", "Llama-2-7B"),
        (
            ("0", "17.90", "460.29", "21.62", "3359.95"),
            ("1", "12.12", "14.99", "11.95", "11.88"),
            ("2", "12.12", "15.00", "12.09", "10.51"),
            ("4", "12.12", "14.99", "12.09", "9.59"),
            ("8", "12.12", "14.98", "12.02", "9.54"),
        ),
    ),
    "attention": Reported(
        "Fig. 2",
        "Llama-2-7B, averages over 256 sentences of 16 tokens: the first two layers attend to recent tokens; from "
        "there on all layers and heads attend heavily to the first token.",
    ),
    "long": Reported(
        "Fig. 5",
        "Perplexity stays stable over four million tokens of the PG19 test set: Llama-2 7B, 13B and 70B, Falcon 7B "
        "and 40B, Pythia 2.8B, 6.9B and 12B, MPT 7B and 30B.",
    ),
    "cache-sizes": Reported(
        "Table 6",
        "PG19 test set, 400,000 tokens, perplexity. More cache does not always help.",
        ("cache", "Falcon-7B", "MPT-7B", "Pythia-12B", "Llama-2-7B"),
        (
            ("4 + 252", "13.61", "14.12", "13.17", ""),
            ("4 + 508", "12.84", "14.25", "12.52", "9.73"),
            ("4 + 1020", "12.34", "14.33", "12.08", "9.32"),
            ("4 + 2044", "12.84", "14.99", "12.09", "9.08"),
            ("4 + 4092", "", "", "", "9.59"),
        ),
    ),
    "latency": Reported(
        "Fig. 10",
        "Decoding a token on an NVIDIA A6000, milliseconds: re-computation / StreamingLLM. Up to 22.2 times as fast, "
        "with about the same memory.",
        ("cache", "Llama-2-7B", "Llama-2-13B"),
        (
            ("256", "63 / 31", "99 / 48"),
            ("512", "103 / 31", "169 / 52"),
            ("1024", "223 / 35", "361 / 60"),
            ("2048", "523 / 45", "860 / 75"),
            ("4096", "1411 / 65", "2355 / 106"),
        ),
    ),
    "stream-eval": Reported(
        "Fig. 9, Table 7",
        "A query every 10 lines about the line 20 lines back: StreamingLLM stays accurate up to 120,000 tokens, dense "
        "attention fails at the length of pre-training, window attention at the cache size. By distance "
        "(Llama-2-7B-32K-Instruct, 23 tokens a line), accuracy in percent:",
        ("lines back", "4 + 2044", "4 + 4092", "4 + 8188", "4 + 16380"),
        (
            ("20", "85.80", "84.60", "81.15", "77.65"),
            ("40", "80.35", "83.80", "81.25", "77.50"),
            ("60", "79.15", "82.80", "81.50", "78.50"),
            ("80", "75.30", "77.15", "76.40", "73.80"),
            ("100", "0.00", "61.60", "50.10", "40.50"),
            ("150", "0.00", "68.20", "58.30", "38.45"),
            ("200", "0.00", "0.00", "62.75", "46.90"),
            ("400", "0.00", "0.00", "0.00", "45.70"),
            ("600", "0.00", "0.00", "0.00", "28.50"),
            ("800", "0.00", "0.00", "0.00", "0.00"),
            ("1000", "0.00", "0.00", "0.00", "0.00"),
        ),
    ),
    "questions": Reported(
        "Table 5",
        "ARC-Easy / ARC-Challenge in one stream, a cache of 1,024 tokens, exact match in percent. Dense attention ran "
        "out of memory.",
        ("", "Llama-2-7B-Chat", "Llama-2-13B-Chat", "Llama-2-70B-Chat"),
        (
            ("one-shot", "71.25 / 53.16", "78.16 / 63.31", "91.29 / 78.50"),
            ("window", "3.58 / 1.39", "0.25 / 0.34", "0.12 / 0.32"),
            ("StreamingLLM", "71.34 / 55.03", "80.89 / 65.61", "91.37 / 80.20"),
        ),
    ),
    "positions": Reported(
        "Section 3.2",
        "Positions within the cache, not those of the text, are called crucial; no figures are given.",
    ),
}
