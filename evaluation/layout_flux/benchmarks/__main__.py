"""python -m evaluation.layout_flux.benchmarks requests|generate|detect|questions|score ..."""

from backlot.command_line import run_command

PLACE = "evaluation.layout_flux.benchmarks.commands"
COMMANDS = {
    "requests": (f"{PLACE}:requests", "a benchmark's annotations -> one request per line"),
    "generate": (f"{PLACE}:generate", "requests -> pictures, <id>.jpg"),
    "detect": (f"{PLACE}:detect", "pictures -> detections (GroundingDINO, SAM)"),
    "questions": (f"{PLACE}:questions", "what a vision-language model is to be asked"),
    "score": (f"{PLACE}:score", "detections and answers -> the benchmark's scores"),
}


def main(argv: list[str] | None = None) -> None:
    run_command(COMMANDS, "evaluation.layout_flux.benchmarks", argv)


if __name__ == "__main__":
    main()
