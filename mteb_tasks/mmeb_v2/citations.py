"""BibTeX entries of MMEB-V2 and of the set that mteb has no entry for."""

from __future__ import annotations

MMEB_V2_BIBTEX = r"""
@article{meng2025vlm2vecv2,
  author = {Meng, Rui and Jiang, Ziyan and Liu, Ye and Su, Mingyi and Yang, Xinyi and Fu, Yuepeng and Qin, Can and Chen, Zeyuan and Xu, Ran and Xiong, Caiming and Zhou, Yingbo and Chen, Wenhu and Yavuz, Semih},
  journal = {arXiv preprint arXiv:2507.04590},
  title = {VLM2Vec-V2: Advancing Multimodal Embedding for Videos, Images, and Visual Documents},
  year = {2025},
}
"""
VIDORAG_BIBTEX = r"""
@article{wang2025vidorag,
  author = {Wang, Qiuchen and Ding, Ruixue and Chen, Zehui and Wu, Weiqi and Wang, Shihang and Xie, Pengjun and Zhao, Feng},
  journal = {arXiv preprint arXiv:2502.18017},
  title = {ViDoRAG: Visual Document Retrieval-Augmented Generation via Dynamic Iterative Reasoning Agents},
  year = {2025},
}
"""
