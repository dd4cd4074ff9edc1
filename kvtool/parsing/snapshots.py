"""Snapshots: save, generate."""

from __future__ import annotations

from typing import Annotated

import typer

from kvtool.parsing._shared import AsJson, Device, Dtype, Force, ModelName, Output, document, emit, one_document

app = typer.Typer()


@app.command(short_help="Read a document, and write its cache to a file.", epilog=(
    "\b\nExamples:"
    "\n  kvtool save smollm2 report.txt --plan smollm2.cachegen.plan.safetensors"
    "\n  kvtool save smollm2 default --tokens 1500 -o default.kv.safetensors"
))  # fmt: skip
def save(
    model: ModelName,
    document: Annotated[str, typer.Argument(metavar="DOCUMENT", help="A text file, - for stdin, or default.")],
    plan: Annotated[str | None, typer.Option(
        help="A plan, - for stdin, or the name of one in calibrations/. Default: the full cache."
    )] = None,
    prefix: Annotated[str | None, typer.Option(
        metavar="FILE", help="A text that documents share: read before this one, and not in its file."
    )] = None,
    output: Output = None,
    tokens: Annotated[int, typer.Option(help="Read only so many tokens of the document (0: all).")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Windowed heads see only their window in prefill.")] = False,
    chunk: Annotated[int, typer.Option(help="Prefill in chunks of this many tokens (0: at once).")] = 0,
    device: Device = "cpu", dtype: Dtype = "float32", force: Force = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Read a document and write its cache: a snapshot that another run goes on from.

    The file has what the plan holds, codes entropy-coded, and the plan itself. Documents that were saved after the same
    --prefix can be generated from together, each under a plan of its own.
    """
    from kvtool.commands import save as save_command

    one_document(output, as_json)
    record = save_command.run(model, document, plan, prefix, output, tokens, strict, chunk, device, dtype, force)
    emit(record, as_json)


@app.command(short_help="Go on from such files: print what the model writes.", epilog=(
    "\b\nExamples:"
    "\n  kvtool generate smollm2 report.kv.safetensors $'\\nIn short, the report says that'"
    "\n  kvtool generate smollm2 report.kv.safetensors -p $'\\nWho wrote it?' -p $'\\nWhen?' --json"
    "\n  kvtool generate smollm2 a.kv.safetensors b.kv.safetensors $'\\nBoth say that' --plan ape.plan.safetensors"
))  # fmt: skip
def generate(
    model: ModelName,
    words: Annotated[list[str], typer.Argument(
        metavar="SNAPSHOT... [PROMPT]",
        help="What kvtool save wrote, one document or several, in any order; last the text that follows them, unless "
        "options say it. Either may be - for stdin.",
    )],
    prompt: Annotated[list[str], typer.Option(
        "-p", "--prompt", metavar="TEXT", help="A text that follows the documents; repeatable."
    )] = [],
    prompts: Annotated[str | None, typer.Option(
        metavar="FILE", help="Texts that follow the documents: a line each, or prompt in JSON lines; - for stdin."
    )] = None,
    plan: Annotated[str | None, typer.Option(
        help="A plan for what follows the documents, and for how they take part: a file, - for stdin, or a name."
    )] = None,
    position: Annotated[str | None, typer.Option(
        metavar="MODE", help="Where several documents stand: shared (all where they were read) or contiguous."
    )] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate at most, for each prompt.")] = 64,
    device: Device = "cpu", dtype: Dtype = "float32", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Go on from a snapshot: print what the model writes after the document and a prompt, most likely token first.

    Several documents that were saved after one prefix are put together without being read again. The prefix alone,
    saved without a plan, may be among the files; else it is read anew.

    Several prompts are answered at once, each as if it were alone; their texts are printed with an empty line between.
    """
    from kvtool.commands import generate as generate_command

    record = generate_command.run(model, words, prompt, prompts, plan, position, tokens, device, dtype)
    print(document(record) if as_json else "\n\n".join(answer["text"] for answer in record["answers"]))
