"""Fields of other servers that would change the answer and are not obeyed, with the values that change
nothing.

Sources: OpenAI's API reference; vLLM's sampling and chat parameters; llama-server's README.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SAMPLING: Mapping[str, Sequence[Any]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "banned_tokens": ([],),
    "best_of": (1,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "lora": ([],),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "n_predict": (),
    "n_probs": (0,),
    "no_repeat_ngram_size": (0,),
    "prompt_logprobs": (),
    "repeat_last_n": (-1,),
    "repeat_penalty": (1,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "samplers": (),
    "skip_special_tokens": (True,),
    "smoothing_factor": (0,),
    "spaces_between_special_tokens": (True,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "truncate_prompt_tokens": (),
    "typical": (1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}
GRAMMARS: Mapping[str, Sequence[Any]] = {
    "grammar": ("",),
    "guided_grammar": ("",),
    "structural_tag": ("",),
}
COMPLETIONS = {**SAMPLING, **GRAMMARS, "suffix": ("",), "input_suffix": ("",), "input_prefix": ("",)}
CHAT = {
    **SAMPLING,
    **GRAMMARS,
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "thinking_budget": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
RESPONSES: Mapping[str, Sequence[Any]] = {
    "background": (False,),
    "conversation": (),
    "previous_response_id": (),
    "prompt": (),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
