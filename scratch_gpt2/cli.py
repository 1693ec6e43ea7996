"""What the example scripts share: a user's mistake ends in one line, and a missing network is noticed at once."""

import os
import sys
from collections.abc import Callable

from huggingface_hub import constants, get_session


def run_main(main: Callable[[], object]) -> None:
    """Call `main`; end with `error: ...` on stderr and exit code 1 where it raises what a user can cause.

    Those are OSError (a file, the network), ValueError (a value, a text) and ImportError (an optional package).
    Ctrl-C ends with one line and exit code 130. Anything else is a mistake of ours and keeps its traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)


def offline_unless_hub_answers(name_or_path: str) -> None:
    """For a Hub id: if the Hub does not answer, look only into the local cache, as HF_HUB_OFFLINE=1 does.

    Otherwise the client tries again and again for most of a minute.
    """
    if os.path.exists(name_or_path):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the types depend on huggingface_hub's HTTP library
        constants.HF_HUB_OFFLINE = True
