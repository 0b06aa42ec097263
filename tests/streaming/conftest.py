from tests.checkpoint.conftest import families as families
