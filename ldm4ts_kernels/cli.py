"""`ldm4ts`: the command's entry point. Turns errors into one line and an exit code.

Exit codes: 0; 1 for a failed run; 2 for wrong usage; 130 when stopped by Ctrl-C or SIGTERM.
"""

import sys
from typing import Any, NoReturn

EXTRAS = {"nicegui": "panel", "uvicorn": "panel"}  # all else comes with the extra ldm4ts


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
    import typer

    from ldm4ts_kernels.data import OptionError
    from ldm4ts_kernels.machine_commands import app
    from ldm4ts_kernels.training import TrainingInterrupted

    debug = "--debug" in sys.argv
    # Typer carries a click of its own; this is how its name for wrong usage is to be had.
    usage_error: type[Any] = typer.BadParameter.__bases__[0]
    try:
        return app(prog_name="ldm4ts", standalone_mode=False) or 0
    except usage_error as error:
        _explain_usage(error)
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


def _explain_usage(error: Any) -> NoReturn:
    """Say in one line what is wrong and where the options are; the bare command shows its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(2)
    command = error.ctx.command_path if error.ctx else "ldm4ts"
    _exit_with(f"{error.format_message().rstrip('.')}; `{command} --help` lists the options", 2)


def _exit_with(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"ldm4ts: {' '.join(message.split())}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
