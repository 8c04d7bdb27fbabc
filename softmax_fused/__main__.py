"""``python -m softmax_fused`` is ``softmax-fused``."""

from softmax_fused.cli import main

if __name__ == "__main__":
    main()
