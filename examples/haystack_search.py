"""Use a UniME model in Haystack: documents with our vectors in a document store, found by an embedding retriever.

pip install haystack-ai. Without it, only the vectors are computed.
"""

from __future__ import annotations

import tempfile

from unime_st import UniME
from unime_st.data.scenes import write_example_images

try:
    from haystack import Document
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore
except ImportError:
    Document = InMemoryEmbeddingRetriever = InMemoryDocumentStore = None


def main() -> None:
    """Search drawn images by text."""
    model = UniME("unime-tiny")
    paths = [str(path) for path in write_example_images(tempfile.mkdtemp())]
    vectors = model.encode_document(paths)  # the path or URL of an image stands for the image
    if Document is None:
        print(f"haystack-ai is not installed: {len(vectors)} vectors of {vectors.shape[1]} dimensions")
        return
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    store.write_documents([Document(content=path, embedding=vector.tolist()) for path, vector in zip(paths, vectors)])
    retriever = InMemoryEmbeddingRetriever(store, top_k=3)
    result = retriever.run(query_embedding=model.encode_query("blue triangle").tolist())
    for found in result["documents"]:
        print(f"{found.score:.3f} {found.content}")


if __name__ == "__main__":
    main()
