"""What makes the pages of benchmarks/results/: python -m studies NAME ..."""

import sys

import pipeline  # noqa: F401  before torch: it silences a warning of torch's import
from pipeline.settings import Parser
from pipeline.stage import run_cli
from studies import (ecosystem, known_memory, known_memory_page, objectives, pages, pretrained,
                     readings)
from studies.demo import make_demo

STUDIES = {"objectives": objectives.main, "pretrained": pretrained.main,
           "known_memory": known_memory.main, "known_memory_page": known_memory_page.main,
           "readings": readings.main, "masks": readings.masks, "ecosystem": ecosystem.main,
           "pages": pages.main, "demo": make_demo.main}


def main(argv: list[str]):
    parser = Parser(prog="python -m studies", description=__doc__)
    commands = parser.add_subparsers(dest="study", required=True, metavar="NAME")
    for name, function in STUDIES.items():
        commands.add_parser(name, help=function.__doc__, add_help=False)
    STUDIES[parser.parse_args(argv[:1]).study](argv[1:])


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
