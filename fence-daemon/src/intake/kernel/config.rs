//! The program's configuration, which may change while it runs.

use aya::maps::{Array, MapData};
use fence_common::boundary::{Config, Listener, name};
use fence_common::rate_limit::Limits;

use super::{Error, KernelProgram, handle, map_error};
use crate::intake::rate_limits::LimitsMap;

/// The map with the configuration of a program, and what it is to say.
pub struct ConfigMap {
    map: Array<MapData, [u8; size_of::<Config>()]>,
    listener: Listener,
}

impl std::fmt::Debug for ConfigMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ConfigMap").field(&self.listener).finish()
    }
}

impl KernelProgram {
    /// The configuration of this program, which says what `listener` does.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn config(&self, listener: Listener) -> Result<ConfigMap, Error> {
        let map = Array::try_from(handle(&self.forms, name::CONFIG)?).map_err(map_error(name::CONFIG))?;
        Ok(ConfigMap { map, listener })
    }
}

impl LimitsMap for ConfigMap {
    /// A run of the program may see some new limits beside old ones, which does no harm. All else
    /// stays as it is.
    fn put(&mut self, limits: &Limits) -> Result<(), Error> {
        let listener = Listener { limits: *limits, ..self.listener };
        let config: [u8; size_of::<Config>()] = zerocopy::transmute!(Config::new(&listener));
        self.map.set(0, config, 0).map_err(map_error(name::CONFIG))
    }
}
