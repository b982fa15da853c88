"""Use a UniME model in LangChain: `UniMEEmbeddings` is an `Embeddings` for any vector store (pip install langchain-core).

Documents are texts, image files (paths or URLs), or both. Without LangChain installed the class works on its own.
"""

from __future__ import annotations

import tempfile

from unime_st import UniME
from unime_st.data.scenes import write_example_images

try:
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import InMemoryVectorStore
except ImportError:
    Embeddings, InMemoryVectorStore = object, None


class UniMEEmbeddings(Embeddings):
    """LangChain embeddings of texts and image files.

    Args:
        model: The embedding model.
    """

    def __init__(self, model: UniME) -> None:
        self.model = model

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents; the path or URL of an image stands for the image."""
        return self.model.encode_document(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        """Embed a query."""
        return self.model.encode_query(text).tolist()


def main() -> None:
    """Search drawn images by text."""
    embeddings = UniMEEmbeddings(UniME("unime-tiny"))
    paths = [str(path) for path in write_example_images(tempfile.mkdtemp())]
    if InMemoryVectorStore is None:
        vectors = embeddings.embed_documents(paths)
        print(f"langchain-core is not installed: {len(vectors)} vectors of {len(vectors[0])} dimensions")
        return
    store = InMemoryVectorStore(embeddings)
    store.add_texts(paths)
    for found, score in store.similarity_search_with_score("blue triangle", k=3):
        print(f"{score:.3f} {found.page_content}")


if __name__ == "__main__":
    main()
