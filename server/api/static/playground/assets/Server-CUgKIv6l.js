import{a as e,f as o}from"./index-C4Od5-EE.js";var t=o("<h1>Server</h1>");function h(r){var a=t();e(r,a)}export{h as default};
