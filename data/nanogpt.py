# Flags of nanoGPT that are not here, and what to do instead
FLAGS = {
    "--lr": "it is --learning_rate", "--eval_only": "use python eval_extrapolation.py OUT_DIR",
    "--wandb_log": "losses are in OUT_DIR/log.jsonl, and python -m experiments.plot_log OUT_DIR draws them",
    "--wandb_project": "losses are in OUT_DIR/log.jsonl", "--wandb_run_name": "losses are in OUT_DIR/log.jsonl",
    "--decay_lr": "for a constant rate, give --min_lr the value of --learning_rate",
    "--always_save_checkpoint": "ckpt.pt is always saved, best.pt if it is the best so far",
    "--backend": "it follows from --device", "--num_epochs": "give --max_iters"}
FLAGS |= {f"--init_from {name}": "GPT-2's weights are not downloaded; name a ckpt.pt of nanoGPT or a run's folder"
            for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
FLAGS |= {"--init_from resume": "add --resume", "--init_from scratch": "leave it out"}
