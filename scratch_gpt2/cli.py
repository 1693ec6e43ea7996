"""What every example script does with a mistake of its user: one line, no traceback."""

import sys
from collections.abc import Callable


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
