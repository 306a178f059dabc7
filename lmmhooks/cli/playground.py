"""``lmmhooks playground``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from lmmhooks.cli.output import note

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def playground(
    model: Annotated[str, typer.Option(help="Model to load: a bundled name, a folder or a hub id.")] = "tiny-llava",
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0: any that is free.")] = 7860,
    dtype: Annotated[str, typer.Option(help="Type of the weights; auto: as they were saved.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where the model goes; unset: CUDA if there is one.")] = None,
    backend: Annotated[str | None, typer.Option(help="Attention backend; unset: the model's own choice.")] = None,
) -> None:
    """Ask a model about a picture in the browser: as it is beside under methods, with overlays and cost."""
    from lmmhooks.errors import LmmhooksError
    from lmmhooks.playground.server import HOST, listen, serve

    if find_spec("gradio") is None:
        raise LmmhooksError("the playground needs gradio, which is not installed: pip install 'lmmhooks[ui]'")
    # A port that is taken is said before a model is loaded, which may take minutes.
    listener = listen(port)
    try:
        from lmmhooks.loading import load

        loaded, processor = load(model, dtype=dtype, device=device, attn_implementation=backend)

        from lmmhooks.playground.app import application
        from lmmhooks.playground.session import Session

        number = listener.getsockname()[1]
        page = application(Session(loaded, processor, model), number)
        note(f"the playground is at http://{HOST}:{number} until you press Ctrl-C")
        serve(page, listener)
    except KeyboardInterrupt:
        # The way to end it, not a failure.
        note("stopped")
    finally:
        listener.close()
