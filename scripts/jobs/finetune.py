# /// script
# requires-python = ">=3.10"
# dependencies = ["cap_hf[demo,plots,recovery]"]
# ///
"""`cap-hf finetune` on a machine that is gone afterwards: for `hf jobs uv run`, and `uv run`.

    bash scripts/wheel.sh          # once: builds dist/cap_hf-...whl, which the job takes
    hf jobs uv run --flavor a10g-small --timeout 12h --secrets HF_TOKEN -v ./dist:/dist -e UV_FIND_LINKS=/dist \
        scripts/jobs/finetune.py --model_name_or_path user/deit-small-sparsity-0.75 \
        --teacher_model_name_or_path facebook/deit-small-patch16-224 --dataset_name imagenet-1k --output_dir recovered \
        --num_train_epochs 10 --learning_rate 1e-4 --push_to_hub true --hub_model_id user/deit-small-75

Its arguments are those of `cap-hf finetune`. What is not pushed is lost with the machine.
"""

import sys

from cap_hf.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
