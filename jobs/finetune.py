"""Fine-tune K LoRA experts of one base in parallel and score them against a linear probe.

python -m jobs.finetune -c configs/finetune/text.yaml [key=value ...]
"""

from icm_ray.jobs import JOBS

work = JOBS["finetune"]

if __name__ == "__main__":
    work.main(__doc__)
