"""``python -m sora_models`` is the ``sora`` console script."""

from __future__ import annotations

import sys

from sora_models.cli import main

sys.exit(main())
