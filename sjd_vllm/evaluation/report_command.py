"""`sjd-vllm report`: one page, as HTML and as Markdown, about runs of `sjd-vllm eval`."""

from __future__ import annotations

import argparse

from sjd_vllm.images.flags import Parser


def add_flags(parser: Parser) -> None:
    """The flags of this command."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of `sjd-vllm eval`; the first is the main one")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="of report.html and report.md (in the first run)")
    parser.add_argument("--load-curve", metavar="CSV", help="rows of benchmarks/load_curve.py to draw as well")
    parser.add_argument("--note", default="", metavar="TEXT", help="said at the top of the page")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")


def run(args: argparse.Namespace) -> int:
    """Read, draw, write."""
    from sjd_vllm.evaluation.report import write_report

    for path in write_report(args.runs, args.output, load_curve=args.load_curve, note=args.note):
        print(path)
    return 0
