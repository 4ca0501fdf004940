"""Fine-tuning of experts: one LoRA adapter and one head per task, on a frozen base."""
