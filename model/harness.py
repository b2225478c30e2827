"""lm-evaluation-harness's own command, which then knows models of this project without an export.

python -m model.harness run --model hf --model_args pretrained=runs/mine/final --tasks lambada_openai

In a program, `import model.modeling` does the same for `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import sys


def main() -> None:
    """`lm_eval` under this name, with `mor` among the Auto classes."""
    import model.modeling  # noqa: F401  (registers it)

    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        sys.exit("error: needs lm-evaluation-harness: pip install 'lm-eval' (the extra `evaluate`)")
    cli_evaluate()


if __name__ == "__main__":
    main()
