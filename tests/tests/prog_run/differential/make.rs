//! Cases from real requests of stock clients: the golden datagrams of `fence-common/fixtures`, in
//! frames, and changed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use etherparse::{EtherType, PacketBuilder, SingleVlanHeader, VlanHeader, VlanId, VlanPcp};
use fence_common::digest::PreparedKey;
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT, REQUEST_LEN, Request};
use fence_lab::loaded::SHORTEST;
use fence_lab::tools;
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::case::{Case, Setting};

fn fixtures() -> PathBuf {
    tools::workspace().join("fence-common/fixtures")
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("{}", path.display()))
}

/// The fixtures' keys by their length.
pub(super) struct Keys(BTreeMap<usize, Key>);

/// They are as long as their names say. (5000: of it the first 4096 bytes count.)
const KEYS: [usize; 6] = [1, 12, 115, 512, 4096, 5000];

impl Keys {
    /// Reads them.
    pub(super) fn read() -> Result<Self> {
        let key = |len: usize| -> Result<_> {
            let bytes = read(&fixtures().join(format!("keys/{len}.key")))?;
            Ok((len, Key::new(&bytes).with_context(|| format!("the key of {len}"))?))
        };
        Ok(Self(KEYS.into_iter().map(key).collect::<Result<_>>()?))
    }

    /// A key as the program wants it; of a length that there is not, the shortest.
    #[must_use]
    pub(super) fn prepared(&self, len: usize) -> PreparedKey {
        PreparedKey::new(self.get(len))
    }

    fn get(&self, len: usize) -> &Key {
        self.0.get(&len).unwrap_or_else(|| &self.0[&KEYS[0]])
    }
}

/// Numbers that look random and follow from a seed (SplitMix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap_or(0)
    }

    fn one_in(&mut self, end: usize) -> bool {
        self.below(end) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// A byte, more often than not one that means something somewhere.
    fn byte(&mut self) -> u8 {
        if self.one_in(3) {
            self.next().to_le_bytes()[0]
        } else {
            self.pick(&[
                0, 1, 2, 3, 4, 6, 7, 8, 10, 17, 0x45, 0x46, 0x60, 0x7f, 0x80, 0x81, 0x86, 0x88, 0xe0, 0xe1, 0xff,
            ])
        }
    }
}

/// Makes cases.
pub(super) struct Maker {
    dice: Dice,
    keys: Keys,
    seeds: Vec<Request>,
    setting: Setting,
    before: Vec<u8>,
}

/// Offsets where a byte of a request has a meaning: operation, kind, the domain's ends, address,
/// port, family, and the digest's ends.
const TELLING: [usize; 16] = [0, 1, 4, 67, 68, 69, 71, 83, 96, 97, 108, 109, 111, 112, 131, 175];

/// Offsets where a byte of an untagged frame's headers has a meaning: type, version, lengths,
/// fragments, protocol, addresses, port.
const TELLING_HEADER: [usize; 18] = [12, 13, 14, 14, 16, 17, 18, 19, 20, 20, 21, 23, 26, 30, 36, 37, 38, 39];

impl Maker {
    /// A maker whose cases follow from `seed`.
    pub(super) fn new(seed: u64) -> Result<Self> {
        let folder = fixtures().join("datagrams");
        let entries = folder.read_dir().with_context(|| format!("{}", folder.display()))?;
        let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        paths.sort();
        let datagram = |path: &PathBuf| {
            Request::read_from_bytes(&read(path)?).ok().with_context(|| format!("{} is no request", path.display()))
        };
        let seeds = paths.iter().map(datagram).collect::<Result<Vec<_>>>()?;
        Ok(Self { dice: Dice(seed), keys: Keys::read()?, seeds, setting: Setting::default(), before: Vec::new() })
    }

    /// Another key, minimum and strictness for the cases to come.
    pub(super) fn change_setting(&mut self) {
        self.setting = Setting {
            key: self.dice.pick(&KEYS),
            min_hash: self.dice.pick(&HashKind::ALL),
            strict_source: !self.dice.one_in(4),
            bounded: self.dice.one_in(4),
        };
    }

    /// The next case.
    pub(super) fn make(&mut self) -> Case {
        // A copy of what came before.
        if !self.before.is_empty() && self.dice.one_in(12) {
            return Case { setting: self.setting, frame: self.before.clone() };
        }
        let mut request = self.dice.pick(&self.seeds);
        // Each datagram of a stock client has other random bytes. The same bytes again make a
        // duplicate.
        if !self.dice.one_in(8) {
            request.random.copy_from_slice(&self.dice.next().to_le_bytes()[..6]);
        }
        // A change before signing meets another rule than the digest.
        for _ in 0..self.dice.pick(&[0, 0, 1, 1, 2]) {
            self.change(&mut request);
        }
        if !self.dice.one_in(3) {
            request.hash = self
                .keys
                .get(self.setting.key)
                .request_digest(request.hash_kind().unwrap_or(HashKind::Sha256), &request);
        }
        if self.dice.one_in(4) {
            self.change(&mut request);
        }
        let mut frame = self.frame(&request);
        for _ in 0..self.dice.pick(&[0, 0, 0, 1, 1, 2, 3]) {
            self.mutate(&mut frame);
        }
        frame.resize(frame.len().max(SHORTEST), 0);
        self.before.clone_from(&frame);
        Case { setting: self.setting, frame }
    }

    fn change(&mut self, request: &mut Request) {
        let at = if self.dice.one_in(4) { self.dice.below(REQUEST_LEN) } else { self.dice.pick(&TELLING) };
        // What takes several bytes at once.
        match self.dice.below(48) {
            0 => request.domain = [b'x'; 64],
            1 => request.port.set(0),
            2 => request.address = [0; 28],
            3 => request.address[..4].copy_from_slice(&[127, 0, 0, 1]),
            _ => request.as_mut_bytes()[at] = self.dice.byte(),
        }
    }

    /// A frame to the group, either from the callback address as a stock client sends it, or from
    /// another address.
    fn frame(&mut self, request: &Request) -> Vec<u8> {
        let tag = match self.dice.below(8) {
            0 => Some(0),
            1 => Some(9),
            _ => None,
        };
        let tag = tag.map(|number: u16| {
            VlanHeader::Single(SingleVlanHeader {
                pcp: VlanPcp::ZERO,
                drop_eligible_indicator: false,
                vlan_id: VlanId::try_new(number).unwrap_or(VlanId::ZERO),
                ether_type: EtherType(0),
            })
        });
        let mut payload = request.as_bytes().to_vec();
        match self.dice.below(32) {
            0 => payload.truncate(self.dice.below(REQUEST_LEN)),
            1 => payload.extend_from_within(..),
            2 => payload.push(0),
            _ => {}
        }
        let mut address = [0; 16];
        address.copy_from_slice(&request.address[..16]);
        if address[0] == 127 || self.dice.one_in(16) {
            address[self.dice.below(4)] = self.dice.byte();
        }
        let [a, b, c, d, ..] = address;
        let v6 = if self.dice.one_in(32) { request.addr_len == 4 } else { request.addr_len != 4 };
        let ethernet = PacketBuilder::ethernet2([0x52, 0x54, 0, 0, 0, 11], [1, 0, 0x5e, 0, 0, 12]);
        let mut frame = Vec::with_capacity(512);
        let written = match (tag, v6) {
            (None, false) => {
                ethernet.ipv4([a, b, c, d], DEFAULT_GROUP_V4, 2).udp(40_000, DEFAULT_PORT).write(&mut frame, &payload)
            }
            (None, true) => {
                ethernet.ipv6(address, DEFAULT_GROUP_V6, 2).udp(40_000, DEFAULT_PORT).write(&mut frame, &payload)
            }
            (Some(tag), false) => ethernet
                .vlan(tag)
                .ipv4([a, b, c, d], DEFAULT_GROUP_V4, 2)
                .udp(40_000, DEFAULT_PORT)
                .write(&mut frame, &payload),
            (Some(tag), true) => ethernet
                .vlan(tag)
                .ipv6(address, DEFAULT_GROUP_V6, 2)
                .udp(40_000, DEFAULT_PORT)
                .write(&mut frame, &payload),
        };
        // A frame that could not be written is empty, and a case as well.
        drop(written);
        frame
    }

    fn mutate(&mut self, frame: &mut Vec<u8>) {
        let len = frame.len().max(1);
        match self.dice.below(12) {
            0 => {
                let (at, bit) = (self.dice.below(len), self.dice.below(8));
                if let Some(byte) = frame.get_mut(at) {
                    *byte ^= 1 << bit;
                }
            }
            // The headers: from the Ethernet type to the end of UDP's, of an IPv6 frame with a tag.
            1..=8 => {
                let at = if self.dice.one_in(2) { 12 + self.dice.below(54) } else { self.dice.pick(&TELLING_HEADER) };
                let byte = self.dice.byte();
                if let Some(place) = frame.get_mut(at) {
                    *place = byte;
                }
            }
            9 => frame.truncate(self.dice.below(len)),
            10 => frame.resize(len + 1 + self.dice.below(400), 0xa5),
            _ => {
                let at = self.dice.below(len);
                let end = frame.len().min(at + 1 + self.dice.below(8));
                if at < end {
                    frame.drain(at..end);
                }
            }
        }
    }
}
