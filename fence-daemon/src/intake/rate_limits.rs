//! The rate limits in force: those of user space, and of each kernel program.

use std::sync::{Arc, Mutex};

use fence_common::rate_limit::Limits;
use fence_common::sync::{Current, lock};

use super::kernel;

/// What takes the limits of a kernel program.
pub trait LimitsMap: Send + std::fmt::Debug {
    /// Lets the program limit rates like this from now on.
    ///
    /// # Errors
    /// The kernel refuses; the old limits stay.
    fn put(&mut self, limits: &Limits) -> Result<(), kernel::Error>;
}

/// The limits. Clones are the same ones.
#[derive(Clone, Debug)]
pub struct RateLimits {
    limits: Current<Limits>,
    /// Held while limits change, and while a program gets its first ones.
    programs: Arc<Mutex<Vec<Box<dyn LimitsMap>>>>,
}

impl From<Limits> for RateLimits {
    fn from(limits: Limits) -> Self {
        Self { limits: limits.into(), programs: Arc::default() }
    }
}

impl RateLimits {
    /// The limits of this moment.
    #[must_use]
    pub fn now(&self) -> Limits {
        *self.limits.now()
    }

    /// Gives a kernel program the limits, now and at each change.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn connect(&self, mut program: Box<dyn LimitsMap>) -> Result<(), kernel::Error> {
        let mut programs = lock(&self.programs);
        program.put(&self.now())?;
        programs.push(program);
        Ok(())
    }

    /// Changes the limits everywhere or nowhere.
    ///
    /// # Errors
    /// A kernel program cannot take them.
    pub fn change(&self, limits: Limits) -> Result<(), kernel::Error> {
        let mut programs = lock(&self.programs);
        let before = self.now();
        if let Err(error) = programs.iter_mut().try_for_each(|program| program.put(&limits)) {
            for program in programs.iter_mut() {
                if let Err(error) = program.put(&before) {
                    tracing::error!("old rate limits cannot be put back into the kernel program: {error}");
                }
            }
            return Err(error);
        }
        self.limits.set(limits);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use fence_common::rate_limit::Limit;

    use super::*;

    /// A program with these limits, and those that it refuses.
    #[derive(Clone, Debug)]
    struct Refusing(Arc<Mutex<Limits>>, Option<Limits>);

    impl LimitsMap for Refusing {
        fn put(&mut self, limits: &Limits) -> Result<(), kernel::Error> {
            if self.1 == Some(*limits) {
                return Err(kernel::Error::Missing("a map"));
            }
            *lock(&self.0) = *limits;
            Ok(())
        }
    }

    fn of(requests: u32) -> Limits {
        Limits { deliveries: Limit::per_second(requests, requests), ..Limits::NONE }
    }

    #[test]
    fn limits_change_in_all_programs_or_in_none() {
        let limits = RateLimits::from(of(1));
        let programs = [None, Some(of(3))].map(|refused| Refusing(Arc::new(Mutex::new(Limits::NONE)), refused));
        let in_programs = || [0, 1].map(|at: usize| *lock(&programs[at].0));
        for program in &programs {
            limits.connect(Box::new(program.clone())).unwrap();
        }
        assert_eq!(in_programs(), [of(1); 2]);
        limits.change(of(2)).unwrap();
        assert_eq!((limits.now(), in_programs()), (of(2), [of(2); 2]));
        assert!(limits.change(of(3)).is_err());
        assert_eq!((limits.now(), in_programs()), (of(2), [of(2); 2]));
    }
}
