"""python -m data_prep.layouts.prepare_synthetic_dataset: drawn scenes in output_data/, all else as `prepare` does."""

import sys

from data_prep.layouts.commands import prepare


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    program = "python -m data_prep.layouts.prepare_synthetic_dataset"
    prepare(["--source", "procedural", "--output_dir", "output_data", *argv], program)


if __name__ == "__main__":
    main()
