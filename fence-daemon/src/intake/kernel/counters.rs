//! The kernel program's counters, for readers other than the program's owner.

use std::os::fd::AsFd as _;

use aya::maps::{Map, MapData, MapError, PerCpuArray};
use fence_common::boundary::name;
use fence_common::verdict::{COUNTERS, Counters};

use super::{Error, KernelProgram, map_error};

/// Reads the counters without the program at hand. They keep their last values when it is gone.
#[derive(Debug)]
pub struct CounterReader(Map);

impl CounterReader {
    /// A counter's sum over all CPUs.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn counters(&self) -> Result<Counters, Error> {
        sum(&self.0)
    }
}

impl KernelProgram {
    /// A second reader of the counters.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn reader(&self) -> Result<CounterReader, Error> {
        let Map::PerCpuArray(map) = &self.counters else { return Err(Error::Missing(name::COUNTERS)) };
        let fd = map.fd().as_fd().try_clone_to_owned().map_err(MapError::IoError);
        let map = fd.and_then(MapData::from_fd).map_err(map_error(name::COUNTERS))?;
        Ok(CounterReader(Map::PerCpuArray(map)))
    }

    /// The sum of each counter over all CPUs.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn counters(&self) -> Result<Counters, Error> {
        sum(&self.counters)
    }
}

fn sum(counters: &Map) -> Result<Counters, Error> {
    let mut sum = Counters::default();
    let map = PerCpuArray::<_, [u64; COUNTERS]>::try_from(counters).map_err(map_error(name::COUNTERS))?;
    for cpu in map.get(&0, 0).map_err(map_error(name::COUNTERS))?.iter() {
        sum.add(zerocopy::transmute_ref!(cpu));
    }
    Ok(sum)
}
