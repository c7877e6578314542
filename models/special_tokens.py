"""Special tokens of every sequence; apart from the tokenizer, whose library takes seconds to import."""

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
RECON, RECON_END, SEG, SEG_END = "<recon>", "</recon>", "<seg>", "</seg>"
BBOX, BBOX_END, RESPONSE, RESPONSE_END = "<bbox>", "</bbox>", "<response>", "</response>"
VOLUME, SLICE, KSPACE = "<vol>", "<slice>", "<kspace>"
MAX_QUERIES = 64

SPECIAL_TOKENS = (
    END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD,
    RECON, RECON_END, SEG, SEG_END, BBOX, BBOX_END, RESPONSE, RESPONSE_END, VOLUME, SLICE, KSPACE,
    *(f"<q{i}>" for i in range(MAX_QUERIES)),
)  # fmt: skip
