"""`python -m loramux.bench` is `loramux bench`."""

from __future__ import annotations

import sys

from loramux.bench import main

sys.exit(main())
