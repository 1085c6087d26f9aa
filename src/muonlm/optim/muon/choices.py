"""What a user of Muon may choose by name. The config reads these lists, so nothing here waits for torch.

What the names mean: variants.py, blocks.py (lr modes), muon.py (forms of momentum), newton_schulz.py (methods and
coefficients).
"""

VARIANTS = ("muon", "normuon", "adamuon", "hyperball")
LR_MODES = ("original", "match_rms_adamw", "spectral", "none")
MOMENTUM_FORMS = ("ema", "classical")
METHODS = ("direct", "hybrid", "gram", "cayley")
METHODS_OR_AUTO = ("auto", *METHODS)

Triple = tuple[float, float, float]

COEFFICIENTS: dict[str, list[Triple]] = {
    "keller": [(3.4445, -4.7750, 2.0315)],
    "polar_express": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ],
    "cans": [
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ],
    "deepseek": [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2,
    "polar_express4": [
        (8.104987549112458, -22.625272368504685, 16.262509252400395),
        (3.9199266491325537, -2.827463809125078, 0.5251319539802465),
        (3.3267934539450117, -2.4484843436878276, 0.49001539370739816),
        (2.3476238397737106, -1.7171321621257454, 0.4273086279919582),
    ],
}
"""Triples (a, b, c) per step. A set shorter than the number of steps repeats its last triple; a longer one is cut,
except those of WHOLE, whose last steps are the point of them."""

WHOLE = ("deepseek", "polar_express4")
SAFETY = {"polar_express": 1.02}
