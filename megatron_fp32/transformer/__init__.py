"""Parts of a transformer layer, and the parameters in it that stay fp32."""
