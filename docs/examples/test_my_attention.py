from my_attention import attention

import effattn


@effattn.parametrize_with_laws(attention)
def test_attention(check):
    check()
