import { tellTogether } from "./together.ts";

await tellTogether("interruption", "127.0.78");
