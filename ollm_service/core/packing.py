"""Which models run their rows in packs, and how large are those?

A pack is the new tokens of many rows in one sequence: prompts of rows that join, the newest token of every other. It needs a
model of transformers whose attention is computed by a function that can be chosen, which is given all that attention depends
on, and whose layers are of full, sliding or linear attention; of such models those are named here with which tests compare us.
Any other runs its rows side by side, padded to one length.
"""

from ollm_service.core.plan import BackendId

# What a layer computes at a time; prompts' tokens in one pass, unless a single prompt has more.
BLOCK_TOKENS, MOST_PACK_TOKENS = 1024, 8192
# Tokens of one guess of a draft model; among more rows each token saves too little.
USUAL_GUESS_TOKENS, MOST_DRAFTED_ROWS = 4, 16
# Scores, or cells of a mask, that are there at a time.
MOST_CELLS = 4 * 1024**2
# Tokens that are tried in advance: of one row, and of all rows together with their newest ones.
MOST_TRIED_TOKENS, MOST_TRIED_IN_PASS = 15, 64
PACKED_MODELS = frozenset(
    {
        *("llama", "gemma3", "gemma3_text", "gpt_oss", "qwen3_next", "qwen3_moe", "voxtral"),
        *("cohere2", "gemma2", "glm4", "gpt2", "gpt_neox", "granite", "mistral", "mixtral", "olmo2", "opt", "phi", "phi3"),
        *("qwen2", "qwen3", "smollm3", "starcoder2"),
    }
)
# Those for which transformers has no SDPA attention; they compute all scores.
EAGER_MODELS = frozenset(
    {
        *("bloom", "codegen", "deepseek_v4", "gemma2", "gpt_neo", "gpt_neox_japanese", "gpt_oss", "gptj", "mpt", "xglm"),
        *("granite_swa", "granitemoe_swa", "mimo_v2_flash", "vaultgemma", "flint", "hy_v4", "rwkv", "openai-gpt"),
        *("bigbird_pegasus", "fsmt", "led", "longt5", "mvp", "nllb-moe", "pegasus_x", "prophetnet", "t5gemma"),
        "switch_transformers",
    }
)


def runs_in_packs(model_type: str | None, backend_id: str | None) -> bool:
    """Whether rows of such a model share a pack on this backend.

    The generic one leaves a model the attention that transformers chose for it, where that is not SDPA: ours is another then.
    """
    if model_type not in PACKED_MODELS:
        return False
    return backend_id == BackendId.OPTIMIZED_NATIVE or model_type not in EAGER_MODELS
