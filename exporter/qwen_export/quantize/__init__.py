"""From floats to block-wise codes: formats, GPTQ, and what each layer's precision costs."""
