"""Use a UniME model in LlamaIndex: nodes with our vectors in a vector store, found by a query vector.

pip install llama-index-core. Without it, only the vectors are computed.
"""

from __future__ import annotations

import tempfile

from unime_st import UniME
from unime_st.data.scenes import write_example_images

try:
    from llama_index.core.schema import TextNode
    from llama_index.core.vector_stores import SimpleVectorStore, VectorStoreQuery
except ImportError:
    TextNode = SimpleVectorStore = VectorStoreQuery = None


def main() -> None:
    """Search drawn images by text."""
    model = UniME("unime-tiny")
    paths = [str(path) for path in write_example_images(tempfile.mkdtemp())]
    vectors = model.encode_document(paths)  # the path or URL of an image stands for the image
    if TextNode is None:
        print(f"llama-index-core is not installed: {len(vectors)} vectors of {vectors.shape[1]} dimensions")
        return
    store = SimpleVectorStore()
    store.add([TextNode(id_=path, text=path, embedding=vector.tolist()) for path, vector in zip(paths, vectors)])
    query = VectorStoreQuery(query_embedding=model.encode_query("blue triangle").tolist(), similarity_top_k=3)
    result = store.query(query)
    for score, name in zip(result.similarities, result.ids):
        print(f"{score:.3f} {name}")


if __name__ == "__main__":
    main()
