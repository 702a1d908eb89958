"""``python -m secateur`` is the command line."""

import os
import sys

from secateur.cli import main

if sys.path and sys.path[0] == os.getcwd():  # noqa: PTH109 -- as Python puts it there
    sys.path.append(sys.path.pop(0))  # code of one's own comes after what is installed, as for ``secateur`` itself
main()
