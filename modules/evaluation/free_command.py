"""`kivi evaluate free`: caches on a text that the model writes through them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modules.cli.command import argument, check_least
from modules.evaluation.candidates import Candidate, short_candidates
from modules.evaluation.flags import CacheFlags
from modules.evaluation.free import NEW_TOKENS, QUARTERS, SEEDS, measure_free
from modules.evaluation.loading import load_model
from modules.evaluation.references import other_methods
from modules.evaluation.results import FreeResult
from modules.evaluation.showing import progress_bar, show
from modules.evaluation.streaming import CHUNK
from modules.evaluation.texts import TEXT_HELP, load_text, pieces

PROMPTS, PROMPT_TOKENS = 4, 1024


def run_free(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    candidates: list[Candidate],
    *,
    console: Console,
    model_name: str,
    text: str,
    prompts: int = PROMPTS,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    seeds: int = SEEDS,
    chunk: int = CHUNK,
) -> FreeResult:
    """Measure with a progress bar."""
    ids = torch.cat(pieces(tokenizer, [text], prompts, prompt_tokens))
    with progress_bar(console) as bar:
        task = bar.add_task("", total=new_tokens * (len(candidates) + 2))
        return measure_free(
            model,
            ids,
            candidates,
            new_tokens=new_tokens,
            seeds=seeds,
            chunk=chunk,
            model_name=model_name,
            text_name=text,
            progress=lambda name, tokens: bar.update(task, advance=tokens, description=name),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Free(CacheFlags):
    """Caches on texts that the model writes through them: does it drift?"""

    text: str = argument("prose", TEXT_HELP)
    prompts: int = argument(PROMPTS, "pieces of the text to go on from")
    prompt_tokens: int = argument(PROMPT_TOKENS, "of each")
    new_tokens: int = argument(NEW_TOKENS, "of each continuation")
    seeds: int = argument(SEEDS, "samples of each prompt")
    peers: bool = argument(False, "other methods too: transformers' own quantized caches, KVarN, TurboQuant")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self.prompts, 1, "--prompts")
        check_least(self.prompt_tokens, 1, "--prompt-tokens")
        check_least(self.new_tokens, QUARTERS, "--new-tokens")
        check_least(self.seeds, 2, "--seeds")

    def run(self, console: Console) -> None:
        """Measure, show and save."""
        candidates = self.own_candidates() or short_candidates()
        candidates += other_methods() if self.peers else []
        load_text(self.text)
        model, tokenizer = load_model(self.model, self.dtype, self.device)
        result = run_free(
            model,
            tokenizer,
            candidates,
            console=console,
            model_name=Path(self.model).name,
            text=self.text,
            prompts=self.prompts,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            seeds=self.seeds,
            chunk=self.chunk,
        )
        show(result, self.output)
