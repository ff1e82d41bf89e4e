"""Train with GRPO: start or resume a run, or a sweep (see grpo/commands/train.py).

python launch.py                                       Qwen2.5-1.5B-Instruct on GSM8K
python launch.py experiment=quickstart                 embedded model and data, half a minute on a CPU
python launch.py -m grpo.beta=0.01,0.04                a sweep
python launch.py resume=true [run_dir=outputs/...]     resume a run
"""

import sys

from grpo.commands.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
