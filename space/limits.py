"""Limits on inputs, and errors that visitors see: one sentence, shown as text."""

import html
import inspect
import logging
import re
import traceback
from contextlib import contextmanager
from functools import wraps

import gradio as gr

from scratch_gpt2.tokenization import check_text

MAX_CHARACTERS = 20_000  # of a prompt or a chat message
MAX_EXPLAINED_CHARACTERS = 1_000  # of a text whose words are weighed, or a sentence to look into
MAX_SENTENCE_TOKENS = 64  # of a sentence to look into
MAX_NEW_TOKENS = 300
MAX_FILE_BYTES = 1_000_000
MAX_ROWS = 1_000
MAX_COLUMNS = 100

WORD_JOINER = "\u2060"  # has no width

logger = logging.getLogger(__name__)


def check_input(text: str, most: int = MAX_CHARACTERS) -> str:
    """Return the text. Raises ValueError where it is not a text, empty, too long or not valid Unicode."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError("There is no text; type some first.")
    if len(text) > most:
        raise ValueError(f"The text has {len(text):,} characters, and at most {most:,} are read here; shorten it.")
    try:
        return check_text(text)
    except ValueError:
        raise ValueError("The text contains a damaged character, half of an emoji for example; remove it.") from None


def counted(number: int, noun: str) -> str:
    """`1 character`, `2 characters`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def text_only(preprocess):
    """A chatbot's `preprocess` that rejects messages with files or components. Gradio would create every component
    that a client names, with arguments of the client's choice."""

    @wraps(preprocess)
    def checked(payload):
        messages = payload.root if payload else []
        if any(part.type != "text" for message in messages for part in message.content):
            raise refusal("Messages can only contain text.")
        return preprocess(payload)

    return checked


def shown_as_text(postprocess):
    """A chatbot's `postprocess` whose messages look as they were written: a Chatbot removes tags from a message and
    reads `&lt;` as `<`, even with Markdown switched off.

    Followed by a word joiner, `<` begins no tag and `&` no entity. Entities instead would be visible where a message
    is edited, and come back from there.
    """

    @wraps(postprocess)
    def marked(value):
        shown = postprocess(value)
        for message in shown.root:
            for part in (part for part in message.content if part.type == "text"):
                part.text = re.sub(r"<(?=[a-zA-Z/!?])|&(?=[a-zA-Z#])", rf"\g<0>{WORD_JOINER}", part.text)
        return shown

    return marked


def as_written(text: str) -> str:
    """A message from the page without the marks of `shown_as_text`."""
    return re.sub(f"([<&]){WORD_JOINER}", r"\1", text)


def in_one_sentence(function):
    """`function`, or generator function, whose errors visitors see as one sentence, `sentence_of`."""

    @wraps(function)
    def generator(*args, **kwargs):
        with errors_for_visitors():
            yield from function(*args, **kwargs)

    @wraps(function)
    def plain(*args, **kwargs):
        with errors_for_visitors():
            return function(*args, **kwargs)

    return generator if inspect.isgeneratorfunction(function) else plain


@contextmanager
def errors_for_visitors():
    try:
        yield
    except Exception as error:
        raise refusal(sentence_of(error)) from None


def quiet_preprocess(block: gr.blocks.Block) -> None:
    """Refuse what a component cannot read, such as text for a number, without writing it to the log."""
    original = block.preprocess

    @wraps(original)
    def preprocess(payload):
        try:
            return original(payload)
        except Exception:  # Gradio's own message, which goes to the log, holds the value
            raise refusal(f"The value for {block.label or 'an input'!r} cannot be read; choose another.") from None

    block.preprocess = preprocess


def quiet_requests(demo: gr.Blocks) -> None:
    """Answer a request that Gradio itself cannot process with one sentence. Gradio would write it to the log."""
    original = demo.process_api

    @wraps(original)
    async def process_api(*args, **kwargs):
        try:
            return await original(*args, **kwargs)
        except Exception as error:
            if isinstance(error, gr.Error) and not error.print_exception:
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            logger.warning("Request rejected: %s in %s of %s", type(error).__name__, place.name, place.filename)
            raise refusal("This request cannot be processed; reload the page.") from None

    demo.process_api = process_api


def without_traceback(record: logging.LogRecord) -> bool:
    """A filter that reduces a traceback in the log to the kind of error: its message can contain what was sent."""
    if record.exc_info:
        record.msg, record.args = f"{record.getMessage().splitlines()[0]}: {record.exc_info[0].__name__}", ()
        record.exc_info = None
    return True


def refusal(sentence: str) -> gr.Error:
    return gr.Error(for_notice(sentence), print_exception=False)


def for_notice(sentence: str) -> str:
    """Gradio shows the messages of errors and warnings as HTML."""
    return html.escape(sentence.encode(errors="replace").decode(), quote=False)


def sentence_of(error: Exception) -> str:
    """The message shown to a visitor. The log never contains the message or the arguments, which could contain the
    visitor's text: a visitor's mistake is not logged, one of ours with the type of the error and its location."""
    if isinstance(error, gr.Error):
        return html.unescape(error.message)
    if isinstance(error, OSError) and error.errno is not None:  # the system's message contains a path
        return "A file could not be read here; choose another."
    if isinstance(error, ValueError | OSError):
        return " ".join(str(error).split())
    places = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s at\n%s", type(error).__name__, places)
    return "Something went wrong here; the log says where. Please try another input."
