"""`ldm4ts`: the command's entry point. Turns errors into one line and an exit code.

Exit codes: 0; 1 for a failed run; 2 for wrong usage; 130 when stopped by Ctrl-C or SIGTERM.
"""

import sys

EXTRAS = {"nicegui": "panel"}  # all else comes with the extra ldm4ts


def main() -> None:
    """Run the command that sys.argv names and exit the process with its code."""
    try:
        sys.exit(_run())
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("ldm4ts_kernels"):
            raise
        extra = EXTRAS.get(error.name, "ldm4ts")
        _exit_with(f"{error.name} is not installed; pip install 'ldm4ts-kernels[{extra}]'", 1)


def _run() -> int:
    from ldm4ts_kernels.data import OptionError
    from ldm4ts_kernels.machine_commands import app
    from ldm4ts_kernels.training import TrainingInterrupted

    debug = "--debug" in sys.argv
    try:
        app(prog_name="ldm4ts")
    except TrainingInterrupted as stopped:
        _exit_with(str(stopped), 130)
    except OptionError as error:
        if debug:
            raise
        _exit_with(f"{error}", 2)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if debug or isinstance(error, ModuleNotFoundError):
            raise
        hint = "" if isinstance(error, ValueError) else "; `ldm4ts --debug ...` shows where"
        _exit_with(f"{error}{hint}", 1)
    return 0


def _exit_with(message: str, code: int) -> None:
    sys.stderr.write(f"ldm4ts: {' '.join(message.split())}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
