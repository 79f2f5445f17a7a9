# Copyright 2026 physai_decode developers
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Builds and installs the package, by pip as well as by colcon."""

from glob import glob

from setuptools import find_packages
from setuptools import setup

package_name = 'physai_decode'

setup(
    name=package_name,
    version='0.2.0',
    packages=find_packages(include=[package_name, f'{package_name}.*']),
    package_data={package_name: ['models/*/*', 'py.typed', 'ros/fastdds.xml']},
    data_files=[
        ('share/ament_index/resource_index/packages', [f'resource/{package_name}']),
        (f'share/{package_name}', ['package.xml']),
        (f'share/{package_name}/config', sorted(glob('config/*'))),
        (f'share/{package_name}/examples', sorted(glob('examples/*.py'))),
        (f'share/{package_name}/launch', sorted(glob('launch/*.launch.py'))),
        (f'share/{package_name}/systemd', sorted(glob('systemd/*.service'))),
    ],
    python_requires='>=3.10',
    install_requires=[
        'huggingface_hub',
        'jinja2>=3.1.6',
        'llguidance>=1.9',
        'matplotlib',
        'numpy',
        'nvidia-ml-py',
        'pyyaml',
        'rich',
        'safetensors',
        'setuptools',
        'torch>=2.5',
        'transformers>=5',
    ],
    extras_require={
        'http': ['prometheus_client', 'uvicorn>=0.23'],
        'test': ['pytest', 'pytest-timeout'],       # by this colcon knows pytest
    },
    zip_safe=False,
    author='physai_decode developers',
    author_email='physai_decode@example.org',
    maintainer='physai_decode developers',
    maintainer_email='physai_decode@example.org',
    description=(
        'A ROS 2 node that decodes with a language model for one user at a time and reports for '
        'each token how close it came to the limit of the memory bus.'),
    license='Apache-2.0',
    url='https://github.com/physai-decode/physai_decode',
    entry_points={
        'console_scripts': [
            'decode_ask = physai_decode.ros.ask:main',
            'decode_bench = physai_decode.bench:main',
            'decode_node = physai_decode.ros.process:main',
            'decode_watch = physai_decode.ros.watch:main',
        ],
    },
)
