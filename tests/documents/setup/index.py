from tests.documents.script import names

globals().update(names())
