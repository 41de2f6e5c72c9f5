"""The command line: one file a command, each thin.

Nothing heavy is imported here or at the top of a command's file, so that ``--help`` answers at
once; a command imports what it needs when it runs.
"""

from __future__ import annotations

import typer


def make_app() -> typer.Typer:
    """The ``skimp`` command with all its subcommands."""
    from skimp.cli.bench import bench
    from skimp.cli.chat import chat
    from skimp.cli.draft import app as draft
    from skimp.cli.errors import OneLineErrors
    from skimp.cli.evaluate import evaluate
    from skimp.cli.generate import generate
    from skimp.cli.info import info
    from skimp.cli.plan import plan
    from skimp.cli.price import price
    from skimp.cli.shrink import shrink
    from skimp.cli.verify import verify

    app = typer.Typer(
        cls=OneLineErrors,
        name="skimp",
        help="Serve large language models cheaply, and say honestly what the cheapness costs.\n\n"
        "MODEL is a local directory in Hugging Face layout, a Hub id, or an embedded model "
        "(tales, tales-draft).",
        epilog="Run 'skimp COMMAND --help' for a command's options and examples.",
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback(invoke_without_command=True)(_root)
    app.command()(generate)
    app.command()(chat)
    app.command()(bench)
    app.command(name="eval")(evaluate)
    app.command()(plan)
    app.command()(price)
    app.command()(info)
    app.command()(shrink)
    app.add_typer(draft, name="draft")
    app.command()(verify)
    return app


def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        import skimp

        typer.echo(f"skimp {skimp.__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Entry point of the ``skimp`` script."""
    make_app()()
