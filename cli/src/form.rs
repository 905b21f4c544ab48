//! In how few bits a command sends elements.

use std::fmt;
use std::str::FromStr;

use tensorwire::Wire;

/// `None` for elements as they are, which the command line calls f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Form(pub(crate) Option<Wire>);

impl FromStr for Form {
    type Err = String;

    fn from_str(text: &str) -> Result<Form, String> {
        if text == "f32" {
            return Ok(Form(None));
        }
        text.parse().map(|w| Form(Some(w))).map_err(|_| "use one of f32, bf16, q8".into())
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.map_or("f32", Wire::name))
    }
}
