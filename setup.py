from setuptools import setup

# kernels/ and trainer/ sit beside fastkl/ in the repository and inside it once installed: neither name may ever become a
# top-level package (`kernels` is also a Hugging Face distribution). The symlinks in fastkl/ say the same to every tool
# that reads the source tree.
setup(
    packages=["fastkl", "fastkl.kernels", "fastkl.trainer"],
    package_dir={"fastkl": "fastkl", "fastkl.kernels": "kernels", "fastkl.trainer": "trainer"},
    package_data={"fastkl": ["py.typed"], "fastkl.trainer": ["page/*"]},
)
