"""Transformers in the idioms of timm, torchvision, Hugging Face, nanoGPT and torch itself."""

import math

import torch
from torch import nn
from torch.nn import functional


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class TimmAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        attn = self.attn_drop(attn.softmax(dim=-1))
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(0.1 * torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class TimmBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim), TimmAttention(dim, heads), LayerScale(dim)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim), Mlp(dim, 2 * dim), LayerScale(dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class TimmViT(nn.Module):
    """timm's vision transformer: fused queries, keys and values; class token, positions, layer scale."""

    def __init__(self, shape, outputs, dim=12, heads=3, patch=4):
        super().__init__()
        self.patch_embed = nn.Conv2d(shape[0], dim, kernel_size=patch, stride=patch)
        count = (shape[1] // patch) * (shape[2] // patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, count + 1, dim) * 0.02)
        self.blocks = nn.Sequential(TimmBlock(dim, heads), TimmBlock(dim, heads))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, outputs)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        x = self.norm(self.blocks(x))
        return self.head(x[:, 0])


class EncoderBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, heads, dropout=0.0, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.0), nn.Linear(2 * dim, dim))

    def forward(self, input):
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = x + input
        return x + self.mlp(self.ln_2(x))


class TorchvisionViT(nn.Module):
    """torchvision's vision transformer: nn.MultiheadAttention."""

    def __init__(self, shape, outputs, dim=12, heads=3, patch=4):
        super().__init__()
        self.patch_size, self.hidden_dim = patch, dim
        self.conv_proj = nn.Conv2d(shape[0], dim, kernel_size=patch, stride=patch)
        length = (shape[1] // patch) * (shape[2] // patch) + 1
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.empty(1, length, dim).normal_(std=0.02))
        self.layers = nn.Sequential(EncoderBlock(dim, heads), EncoderBlock(dim, heads))
        self.ln = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, outputs)

    def forward(self, x):
        n, c, h, w = x.shape
        n_h, n_w = h // self.patch_size, w // self.patch_size
        x = self.conv_proj(x).reshape(n, self.hidden_dim, n_h * n_w).permute(0, 2, 1)
        batch_class_token = self.class_token.expand(n, -1, -1)
        x = torch.cat([batch_class_token, x], dim=1) + self.pos_embedding
        return self.head(self.ln(self.layers(x))[:, 0])


class BertSelfAttention(nn.Module):
    """Hugging Face's heads: ``view`` by all but the last dimension, ``permute``, and a context of all heads."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, hidden // heads
        self.all_head_size = hidden
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.dropout = nn.Dropout(0.0)

    def transpose_for_scores(self, x):
        new_x_shape = x.size()[:-1] + (self.num_attention_heads, self.attention_head_size)
        x = x.view(new_x_shape)
        return x.permute(0, 2, 1, 3)

    def forward(self, hidden_states):
        query = self.transpose_for_scores(self.query(hidden_states))
        key = self.transpose_for_scores(self.key(hidden_states))
        value = self.transpose_for_scores(self.value(hidden_states))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        probabilities = self.dropout(nn.functional.softmax(scores, dim=-1))
        context = torch.matmul(probabilities, value).permute(0, 2, 1, 3).contiguous()
        return context.view(context.size()[:-2] + (self.all_head_size,))


class BertLayer(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.attention = BertSelfAttention(hidden, heads)
        self.attention_output, self.attention_norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden, eps=1e-12)
        self.intermediate, self.output = nn.Linear(hidden, 20), nn.Linear(20, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x):
        x = self.attention_norm(self.attention_output(self.attention(x)) + x)
        return self.output_norm(self.output(functional.gelu(self.intermediate(x))) + x)


class Bert(nn.Module):
    """An encoder in Hugging Face's manner: three embeddings, norms after the sums, a pooler."""

    def __init__(self, shape, outputs, hidden=12, heads=3):
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(outputs, hidden), nn.Embedding(shape[0], hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(shape[0]).expand((1, -1)), persistent=False)
        self.layer = nn.ModuleList(BertLayer(hidden, heads) for _ in range(2))
        self.pooler, self.activation = nn.Linear(hidden, hidden), nn.Tanh()
        self.classifier = nn.Linear(hidden, outputs)

    def forward(self, input_ids):
        embeddings = self.word_embeddings(input_ids) + self.position_embeddings(self.position_ids)
        x = self.LayerNorm(embeddings)
        for layer in self.layer:
            x = layer(x)
        return self.classifier(self.activation(self.pooler(x[:, 0])))


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.n_head, self.n_embd = n_head, n_embd
        self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = functional.softmax(att, dim=-1)
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)


class GPTBlock(nn.Module):
    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(n_embd), CausalSelfAttention(n_embd, n_head, block_size)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(n_embd, 2 * n_embd), "act": nn.GELU(), "c_proj": nn.Linear(2 * n_embd, n_embd)}
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        m = self.mlp
        return x + m["c_proj"](m["act"](m["c_fc"](self.ln_2(x))))


class GPT(nn.Module):
    """nanoGPT: split projections, a causal mask as a buffer, a head tied to the embedding; predicts the next token."""

    def __init__(self, shape, outputs, n_embd=12, n_head=3):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(outputs, n_embd), nn.Embedding(shape[0], n_embd)
        self.h = nn.ModuleList([GPTBlock(n_embd, n_head, shape[0]) for _ in range(2)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, outputs, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx):
        b, t = idx.size()
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        return self.lm_head(x[:, [-1], :]).squeeze(1)


class LlamaRMSNorm(nn.Module):
    def __init__(self, hidden, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.variance_epsilon = eps

    def forward(self, x):
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def repeat_kv(x, n_rep):
    batch, kv_heads, length, head_dim = x.shape
    if n_rep == 1:
        return x
    x = x[:, :, None, :, :].expand(batch, kv_heads, n_rep, length, head_dim)
    return x.reshape(batch, kv_heads * n_rep, length, head_dim)


class LlamaAttention(nn.Module):
    """Grouped queries, rotary positions, scaled_dot_product_attention."""

    def __init__(self, hidden, heads, kv_heads, head_dim):
        super().__init__()
        self.head_dim, self.n_rep = head_dim, heads // kv_heads
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)

    def forward(self, x, cos, sin):
        input_shape = x.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        q = self.q_proj(x).view(hidden_shape).transpose(1, 2)
        k = self.k_proj(x).view(hidden_shape).transpose(1, 2)
        v = self.v_proj(x).view(hidden_shape).transpose(1, 2)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = repeat_kv(k, self.n_rep), repeat_kv(v, self.n_rep)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = out.transpose(1, 2).contiguous().reshape(*input_shape, -1)
        return self.o_proj(out)


class LlamaLayer(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.self_attn = LlamaAttention(hidden, heads=4, kv_heads=2, head_dim=4)
        self.gate_proj, self.up_proj = nn.Linear(hidden, 20, bias=False), nn.Linear(hidden, 20, bias=False)
        self.down_proj = nn.Linear(20, hidden, bias=False)
        self.input_layernorm, self.post_attention_layernorm = LlamaRMSNorm(hidden), LlamaRMSNorm(hidden)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    """A decoder in Hugging Face's manner: RMS norm, rotary positions, SwiGLU, grouped queries."""

    def __init__(self, shape, outputs, hidden=12):
        super().__init__()
        self.embed_tokens = nn.Embedding(outputs, hidden)
        self.layers = nn.ModuleList([LlamaLayer(hidden) for _ in range(2)])
        self.norm = LlamaRMSNorm(hidden)
        self.lm_head = nn.Linear(hidden, outputs, bias=False)
        angle = torch.outer(torch.arange(shape[0]).float(), 10000.0 ** (-torch.arange(0, 4, 2).float() / 4))
        angle = torch.cat((angle, angle), dim=-1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.lm_head(self.norm(x)[:, -1, :])


class TorchEncoder(nn.Module):
    """torch's own encoder over a signal, with positions; norms first."""

    def __init__(self, shape, outputs, width=12):
        super().__init__()
        self.input = nn.Linear(shape[1], width)
        self.positions = nn.Parameter(torch.zeros(1, shape[0], width))
        layer = nn.TransformerEncoderLayer(width, 3, 20, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, outputs)

    def forward(self, x):
        return self.out(self.encoder(self.input(x) + self.positions).mean(dim=1))


class T5Attention(nn.Module):
    """Attention without a scale, with a learnt relative bias; over another sequence where one is given."""

    def __init__(self, width, heads, key, length):
        super().__init__()
        self.n_heads, self.key_value_proj_dim, self.inner_dim = heads, key, heads * key
        self.q, self.k, self.v = (nn.Linear(width, heads * key, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * key, width, bias=False)
        self.relative_attention_bias = nn.Embedding(2 * length - 1, heads)
        steps = torch.arange(length)
        self.register_buffer("relative", steps[None, :] - steps[:, None] + length - 1, persistent=False)

    def forward(self, hidden, keys=None):
        batch = hidden.shape[0]
        source = hidden if keys is None else keys
        q = self.q(hidden).view(batch, -1, self.n_heads, self.key_value_proj_dim).transpose(1, 2)
        k = self.k(source).view(batch, -1, self.n_heads, self.key_value_proj_dim).transpose(1, 2)
        v = self.v(source).view(batch, -1, self.n_heads, self.key_value_proj_dim).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += self.relative_attention_bias(self.relative).permute(2, 0, 1).unsqueeze(0)
        weights = functional.softmax(scores, dim=-1)
        context = torch.matmul(weights, v).transpose(1, 2).contiguous().view(batch, -1, self.inner_dim)
        return self.o(context)


class T5(nn.Module):
    """An encoder and a decoder with cross-attention, RMS norm of torch, a ReLU feed-forward part."""

    def __init__(self, shape, outputs, width=10):
        super().__init__()
        length = shape[0]
        self.shared = nn.Embedding(outputs, width)
        self.encoder_norm, self.encoder_attention = nn.RMSNorm(width), T5Attention(width, 3, 4, length)
        self.ff_norm, self.wi, self.wo = (
            nn.RMSNorm(width),
            nn.Linear(width, 16, bias=False),
            nn.Linear(16, width, bias=False),
        )
        self.decoder_norm, self.decoder_attention = nn.RMSNorm(width), T5Attention(width, 3, 4, length)
        self.cross_norm, self.cross_attention = nn.RMSNorm(width), T5Attention(width, 3, 4, length)
        self.final_norm, self.lm_head = nn.RMSNorm(width), nn.Linear(width, outputs, bias=False)

    def forward(self, ids):
        x = self.shared(ids)
        memory = x + self.encoder_attention(self.encoder_norm(x))
        memory = memory + self.wo(functional.relu(self.wi(self.ff_norm(memory))))
        y = x + self.decoder_attention(self.decoder_norm(x))
        y = y + self.cross_attention(self.cross_norm(y), memory)
        return self.lm_head(self.final_norm(y)[:, -1])
