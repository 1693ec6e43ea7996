"""What visitors may send, and how a refusal reaches them: one sentence, shown as text."""

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
MAX_NEW_TOKENS = 300
MAX_FILE_BYTES = 1_000_000
MAX_ROWS = 1_000

WORD_JOINER = "\u2060"  # has no width

logger = logging.getLogger(__name__)


def check_input(text: str, most: int = MAX_CHARACTERS) -> str:
    """The text, or ValueError where it is no text, empty, too long or not valid Unicode."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError("There is no text; type some first.")
    if len(text) > most:
        raise ValueError(f"The text has {len(text):,} characters, but at most {most:,} are read here; shorten it.")
    return check_text(text)


def shown_as_text(postprocess):
    """A chatbot's `postprocess` whose messages look as they were written: a Chatbot takes tags out of a message, and
    reads `&lt;` as `<`, with Markdown switched off too.

    With a word joiner behind it, `<` begins no tag and `&` no entity. Entities instead would show where a message is
    edited, and come back from there.
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
    """`function`, or generator function, whose errors visitors see as one sentence.

    The log gets neither the message nor the arguments, which could hold what a visitor has written: for a mistake of
    the visitor's nothing, for one of ours the kind of error and its place in the code.
    """

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
    except (ValueError, OSError) as error:
        raise refusal(" ".join(str(error).split())) from None
    except Exception as error:
        places = "".join(traceback.format_tb(error.__traceback__))
        logger.error("%s at\n%s", type(error).__name__, places)
        raise refusal("Something went wrong here; the log says where. Please try another input.") from None


def refusal(sentence: str) -> gr.Error:
    # Gradio shows the message as HTML.
    return gr.Error(html.escape(sentence.encode(errors="replace").decode(), quote=False), print_exception=False)
