"""`python -m gateway.cli`: the `samovar` command where no script is installed."""

import sys

from gateway.cli import main

sys.exit(main())
