"""BibTeX entries of the losses' papers, for model cards."""

from __future__ import annotations

UNIME_CITATION = """
@misc{gu2025breaking,
    title={Breaking the Modality Barrier: Universal Embedding Learning with Multimodal LLMs},
    author={Tiancheng Gu and Kaicheng Yang and Ziyong Feng and Xingjun Wang and Yanzhao Zhang and Dingkun Long and Yingda Chen and Weidong Cai and Jiankang Deng},
    year={2025},
    eprint={2504.17432},
    archivePrefix={arXiv},
    primaryClass={cs.CV}
}
"""

UNIME_V2_CITATION = """
@misc{gu2025unimev2,
    title={UniME-V2: MLLM-as-a-Judge for Universal Multimodal Embedding Learning},
    author={Tiancheng Gu and Kaicheng Yang and Kaichen Zhang and Xiang An and Ziyong Feng and Yueyi Zhang and Weidong Cai and Jiankang Deng and Lidong Bing},
    year={2025},
    eprint={2510.13515},
    archivePrefix={arXiv},
    primaryClass={cs.CV}
}
"""

QWEN3_EMBEDDING_CITATION = """
@misc{zhang2025qwen3embedding,
    title={Qwen3 Embedding: Advancing Text Embedding and Reranking Through Foundation Models},
    author={Yanzhao Zhang and Mingxin Li and Dingkun Long and Xin Zhang and Huan Lin and Baosong Yang and Pengjun Xie and An Yang and Dayiheng Liu and Junyang Lin and Fei Huang and Jingren Zhou},
    year={2025},
    eprint={2506.05176},
    archivePrefix={arXiv},
    primaryClass={cs.CL}
}
"""
