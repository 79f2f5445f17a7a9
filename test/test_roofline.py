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

"""The floor agrees with figures computed by hand; the peak comes from the best source."""

from fake_engine import footprint
from physai_decode import roofline
from physai_decode.roofline import Peak
from physai_decode.roofline import Roofline
import pytest


def test_floor_of_qwen_7b_on_an_h100():
    # Qwen-2.5-7B in bf16: 28 layers, 4 heads of 128, 15.23 GB; one step at context 2048 took
    # 16.97 ms, 0.27 of the floor (arXiv 2605.30571).
    per_token = roofline.kv_bytes(28, 4, 128, 1, 2)
    assert per_token == 56 * 1024
    floor_s = roofline.floor_s(15_230_000_000, 2048 * per_token, 3350e9)
    assert floor_s == pytest.approx(4.581e-3, rel=1e-3)
    assert roofline.r_floor(floor_s, 16.97e-3) == pytest.approx(0.27, abs=0.001)


def test_floor_and_r_floor_are_none_if_unknown():
    assert roofline.floor_s(1000, 0, None) is None
    assert roofline.floor_s(1000, 0, 0.0) is None
    assert roofline.r_floor(None, 0.1) is None
    assert roofline.r_floor(0.1, None) is None
    assert roofline.r_floor(0.1, 0.0) is None


def test_sliding_window_limits_the_kv_cache():
    assert roofline.kv_bytes(2, 1, 2, 100, 4, sliding_window=10) == 320
    assert roofline.kv_bytes(2, 1, 2, 5, 4, sliding_window=10) == 160
    line = Roofline(footprint(sliding_window=10), Peak(1e6, 'parameter'))
    assert line.kv_bytes(100) == 320
    one_of_two = Roofline(footprint(sliding_window=10, windowed_layers=1), Peak(1e6, 'parameter'))
    assert one_of_two.kv_bytes(100) == 160 + 1600


def test_floor_by_each_convention():
    line = Roofline(footprint(), Peak(1e6, 'parameter'))
    assert line.step_bytes(10) == 1320
    assert line.step_bytes(10, 'checkpoint') == 1820
    assert line.floor_s(10) == pytest.approx(1.32e-3)
    assert line.floor_s(10, 'checkpoint') == pytest.approx(1.82e-3)
    with pytest.raises(ValueError, match="convention is 'paper'.*read or checkpoint"):
        line.step_bytes(10, 'paper')


def test_peak_from_the_parameter_comes_first():
    assert roofline.find_peak(123.0, 'NVIDIA L4', lambda: (1, 1), lambda: 1.0) == Peak(
        123e9, 'parameter')


@pytest.mark.parametrize('clock_khz, width_bits, gb_s', [
    (6_251_000, 192, 300), (2_619_000, 5120, 3352), (9_001_000, 384, 864)])
def test_peak_from_the_driver_comes_second(clock_khz, width_bits, gb_s):
    peak = roofline.find_peak(0.0, 'NVIDIA L4', lambda: (clock_khz, width_bits), lambda: 1.0)
    assert peak.source == 'driver'
    assert peak.bytes_per_s == pytest.approx(gb_s * 1e9, rel=1e-3)


@pytest.mark.parametrize('driver', [None, lambda: None, lambda: (0, 192), lambda: (6_251_000, 0)])
def test_peak_from_the_data_sheet_comes_third(driver):
    assert roofline.find_peak(0.0, 'NVIDIA L4', driver, lambda: 1.0) == Peak(
        300e9, 'NVIDIA L4 datasheet')


def test_peak_is_measured_last_or_unknown():
    assert roofline.find_peak(0.0, 'AMD EPYC', None, lambda: 2e10) == Peak(2e10, 'measured')
    assert roofline.find_peak(0.0, 'AMD EPYC', None, lambda: 0.0) == Peak(None, 'unknown')
    assert roofline.find_peak(0.0, 'AMD EPYC') == Peak(None, 'unknown')


@pytest.mark.parametrize('name, gb_s', [
    ('NVIDIA L4', 300), ('NVIDIA L40S', 864), ('NVIDIA L40', 864), ('Tesla T4', 320),
    ('NVIDIA A10', 600), ('NVIDIA A10G', 600),
    ('NVIDIA A100-SXM4-80GB', 2039), ('NVIDIA A100 80GB PCIe', 1935),
    ('NVIDIA A100-SXM4-40GB', 1555), ('NVIDIA A100-PCIE-40GB', 1555),
    ('NVIDIA H100 80GB HBM3', 3350), ('NVIDIA H100 PCIe', 2000), ('NVIDIA H100 NVL', 3900),
    ('NVIDIA H200', 4800), ('NVIDIA GH200 480GB', 4000), ('NVIDIA B200', 8000),
    ('NVIDIA GeForce RTX 4090', 1008), ('NVIDIA GeForce RTX 5090', 1792),
    ('NVIDIA RTX 6000 Ada Generation', 960), ('NVIDIA RTX A6000', 768), ('NVIDIA GB10', 273),
    ('NVIDIA Jetson AGX Orin Developer Kit', 204.8), ('NVIDIA Orin NX Developer Kit', 102.4),
    ('NVIDIA Orin Nano Developer Kit', 68),
    ('NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super', 102),
    ('NVIDIA Orin Nano Developer Kit 4GB', 34), ('NVIDIA Jetson AGX Thor Developer Kit', 273)])
def test_data_sheet_of_a_device(name, gb_s):
    assert roofline.datasheet(name).bytes_per_s == gb_s * 1e9


@pytest.mark.parametrize('name', [
    '', 'Orin', 'NVIDIA L400', 'NVIDIA A1000', 'NVIDIA GeForce RTX 4090 Laptop GPU',
    'NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'NVIDIA A100-SXM4-80GB MIG 3g.40gb', 'Tesla T40',
    'AMD EPYC', 'NVIDIA RTX A4000'])
def test_device_without_a_data_sheet(name):
    assert roofline.datasheet(name) is None


def test_data_sheet_of_a_jetson_is_found_by_its_board_name(monkeypatch):
    monkeypatch.setattr(roofline, 'board_name', lambda: 'NVIDIA Jetson AGX Orin Developer Kit')
    # The driver of an Orin reports 1300 MHz, which is not the clock of its memory.
    assert roofline.find_peak(0.0, 'Orin', lambda: (1_300_000, 256)) == Peak(
        204.8e9, 'NVIDIA Jetson AGX Orin datasheet')
    assert roofline.find_peak(0.0, 'Some other GPU') == Peak(None, 'unknown')


def test_reads_the_board_name(tmp_path):
    (tmp_path / 'model').write_bytes(b'NVIDIA Jetson AGX Orin Developer Kit\0')
    assert roofline.board_name(str(tmp_path)) == 'NVIDIA Jetson AGX Orin Developer Kit'
    assert roofline.board_name(str(tmp_path / 'none')) == ''


def test_distinguishes_orin_nano_modules_by_memory_size(tmp_path, monkeypatch):
    (tmp_path / 'model').write_bytes(b'NVIDIA Orin Nano Developer Kit\0')
    for gigabytes, gb_s in ((4, 34), (8, 68)):
        monkeypatch.setattr(roofline.os, 'sysconf', lambda name, count=gigabytes: {
            'SC_PHYS_PAGES': count * 10**9 // 4096, 'SC_PAGE_SIZE': 4096}[name])
        assert roofline.datasheet(roofline.board_name(str(tmp_path))).bytes_per_s == gb_s * 1e9


@pytest.mark.parametrize(('compatible', 'gb_s'), [
    (b'nvidia,p3768-0000+p3767-0000-super\0nvidia,p3767-0000\0nvidia,tegra234\0', 102.4),
    (b'nvidia,p3768-0000+p3767-0001\0nvidia,p3767-0001\0nvidia,tegra234\0', 102.4),
    (b'nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0', 102),
    (b'nvidia,p3768-0000+p3767-0003\0nvidia,p3767-0003\0nvidia,tegra234\0', 68),
    (b'nvidia,p3737-0000+p3701-0008\0nvidia,p3701-0008\0nvidia,tegra234\0', 204.8),
    (b'nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0', 273)])
def test_recognises_the_module_on_a_board_of_another_vendor(
        tmp_path, monkeypatch, compatible, gb_s):
    monkeypatch.setattr(roofline.os, 'sysconf', lambda name: {
        'SC_PHYS_PAGES': 8 * 10**9 // 4096, 'SC_PAGE_SIZE': 4096}[name])
    (tmp_path / 'model').write_bytes(b'Vendor Robot Carrier 2\0')
    assert roofline.datasheet(roofline.board_name(str(tmp_path))) is None
    (tmp_path / 'compatible').write_bytes(compatible)
    assert roofline.datasheet(roofline.board_name(str(tmp_path))).bytes_per_s == gb_s * 1e9


def test_measures_the_read_bandwidth_of_the_cpu():
    rate = roofline.measure_cpu_read_bandwidth(threads=1, tries=1)
    assert 1e8 < rate < 1e13


def test_observed_bandwidth_above_the_tolerance_corrects_the_peak():
    peak = roofline.Peak(100e9, 'measured')
    assert roofline.observed_peak(peak, 102.9) is roofline.observed_peak(peak, None) is None
    assert roofline.observed_peak(peak, 104.0) == roofline.Peak(104e9, 'observed in steps')
    assert roofline.observed_peak(roofline.Peak(100e9, 'measured', 'in the cache'), 400.0) is None
    assert roofline.observed_peak(roofline.Peak(None, 'unknown'), 400.0) is None


def test_memory_clock_can_only_lower_the_peak_of_a_data_sheet():
    """It does not change a peak from another source."""
    sheet = roofline.datasheet('NVIDIA Jetson AGX Orin')
    assert roofline.at_clock(sheet, (1600.0, 3200.0)).bytes_per_s == 102.4e9
    nano = roofline.datasheet('NVIDIA Jetson Orin Nano Developer Kit')
    assert roofline.at_clock(nano, (1066.5, 2133.0)).bytes_per_s == 34e9
    thor = roofline.datasheet('NVIDIA Jetson AGX Thor Developer Kit')
    assert roofline.at_clock(thor, (2000.0, 4000.0)).bytes_per_s == 136.5e9
    assert roofline.at_clock(sheet, (3201.0, 3201.0)) == roofline.at_clock(sheet, None) == sheet
    peak = roofline.Peak(100e9, 'parameter')
    assert roofline.at_clock(peak, (1600.0, 3200.0)) == peak


def test_a_power_mode_that_limits_the_memory_clock_lowers_the_peak():
    """jetson-stats then reports that limit as the highest clock."""
    sheet = roofline.datasheet('NVIDIA Jetson AGX Orin')
    assert roofline.at_clock(sheet, (1600.0, 1600.0)).bytes_per_s == 102.4e9


def test_rated_clocks_are_of_boards_in_the_table():
    assert set(roofline._RATED_MHZ) <= {source for _, _, source in roofline._DATASHEETS}


def test_peak_of_a_mig_slice_is_measured():
    """The driver reports the clock and bus width of the whole GPU."""
    assert roofline.find_peak(
        0.0, 'NVIDIA H100 80GB HBM3 MIG 1g.10gb', lambda: (2_619_000, 5120), lambda: 4e11
    ) == roofline.Peak(4e11, 'measured')


def write_cache(folder, cpu, index, level, size, cores):
    """Write the files in which Linux describes a cache."""
    path = folder / f'cpu{cpu}' / 'cache' / f'index{index}'
    path.mkdir(parents=True)
    for name, text in (('level', level), ('size', size), ('shared_cpu_list', cores)):
        (path / name).write_text(f'{text}\n')


def test_last_level_caches_of_two_sockets_are_added_up(tmp_path):
    """Each has two cores; their first-level caches do not count."""
    for cpu in range(4):
        write_cache(tmp_path, cpu, 0, 1, '32K', str(cpu))
        write_cache(tmp_path, cpu, 3, 3, '32M', '0-1' if cpu < 2 else '2-3')
    assert roofline.last_cache_bytes(str(tmp_path)) == 64 << 20
    assert roofline.last_cache_bytes(str(tmp_path / 'none')) is None


def test_weights_that_fit_the_cpu_cache_have_no_floor():
    why = roofline.fits_cache(12_070_000, 32 << 20)
    assert 'the weights that a step reads (12.1 MB) fit the last-level cache (33.6 MB)' in why
    assert roofline.fits_cache(12_070_000, 8 << 20) == roofline.fits_cache(12, None) == ''
    line = roofline.Roofline(footprint(), roofline.Peak(1e9, 'measured', why))
    assert line.floor_s(10) is None
    assert roofline.Roofline(footprint(), roofline.Peak(1e9, 'measured')).floor_s(10) > 0
