"""placeholder"""

import torch


def divergence(kind, parameter, logits, tokens, out, gradient):
    def cap(x, c):
        return x if c is None else c * torch.tanh(x)

    zs, zt = cap(logits.student, logits.student_cap), cap(logits.teacher, logits.teacher_cap)
    lp, lq = zs.log_softmax(-1), zt.log_softmax(-1)
    p, q = lp.exp(), lq.exp()

    def safe(w, r):
        return w * r.where(w > 0, 0.0)

    def mix(a, b):
        return torch.logaddexp(
            lq + torch.log(torch.tensor(a, dtype=p.dtype)), lp + torch.log(torch.tensor(b, dtype=p.dtype))
        )

    b = parameter
    if kind == "reverse_kl":
        phi = safe(p, lp - lq)
        pg = phi
    elif kind == "forward_kl":
        phi = safe(q, lq - lp)
        pg = -q
    elif kind == "jsd":
        m = mix(b, 1 - b)
        phi = b * safe(q, lq - m) + (1 - b) * safe(p, lp - m)
        pg = (1 - b) * safe(p, lp - m)
    elif kind == "skewed_forward_kl":
        m = mix(b, 1 - b)
        phi = safe(q, lq - m)
        pg = -(1 - b) * q * (lp - m).exp()
    elif kind == "skewed_reverse_kl":
        m = mix(1 - b, b)
        phi = safe(p, lp - m)
        pg = safe(p, lp - m - b * (lp - m).exp())
    else:
        phi = 0.5 * (p - q).abs()
        pg = 0.5 * p * torch.sign(p - q)
    out[0] = phi.sum(-1)
    y = tokens
    out[1] = 0 if y is None else -lp.gather(1, y[:, None])[:, 0]
    if out.shape[0] == 8:
        out[2] = 0 if y is None else -lq.gather(1, y[:, None])[:, 0]
        out[3] = torch.special.entr(p).sum(-1)
        out[4] = torch.special.entr(q).sum(-1)
        out[5] = safe(p, lp - lq).sum(-1)
        out[6] = safe(q, lq - lp).sum(-1)
        out[7] = (lp.argmax(-1) == lq.argmax(-1)).to(p.dtype)
    if gradient is not None:
        u = pg - p * pg.sum(-1, keepdim=True)
        if logits.student_cap is not None:
            u = u * (logits.student_cap - zs * zs / logits.student_cap)
        gradient.copy_(u)
