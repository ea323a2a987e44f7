"""Qwen with a packed KIVI cache: `python example_qwen_kivi.py --demo memory` (`--help` lists the others)."""

import sys

from demos import main

if __name__ == "__main__":
    sys.exit(main("qwen"))
